"""A backward pass that cannot itself be differentiated, and says so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from model.errors import ModelError


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make `backward` raise `ModelError` where autograd records it.

    torch's `once_differentiable` refuses only what depends on the incoming gradient; the rest of a second
    derivative it would silently leave out.
    """

    @wraps(backward)
    def refusing(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise ModelError(
                "The loss cannot be differentiated twice; leave out create_graph, or use "
                "model.loss.reference.reference_loss."
            )
        return backward(*args)

    return refusing
