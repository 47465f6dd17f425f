"""A backward pass that cannot itself be differentiated, and that no autocast reaches."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from model.errors import ModelError


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make `backward(ctx, grad, ...)` raise `ModelError` where autograd records it, and switch autocast off.

    torch's `once_differentiable` refuses only what depends on the incoming gradient; the rest of a second
    derivative it would silently leave out.
    """

    @wraps(backward)
    def refusing(ctx: Any, grad: Tensor, *others: Any) -> Any:
        if torch.is_grad_enabled():
            raise ModelError(
                "The loss cannot be differentiated twice; leave out create_graph, or use "
                "model.loss.reference.reference_loss."
            )
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad, *others)

    return refusing
