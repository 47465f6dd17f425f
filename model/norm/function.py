"""Twin batch-norm with an optional residual and ReLU as one differentiable function.

With x^ = (x - mean) rstd, per view and channel, the output is y = max(0, x^ w + b + r). For the gradient g
that comes through the ReLU, with means over the rows of the view on all ranks:

    dr = g      db = sum g      dw = sum g x^      dx = w rstd (g - mean(g) - x^ mean(g x^))

(Ioffe and Szegedy 2015, section 3.) Kept for the backward pass are x, y where there is a ReLU, which the
next layer keeps anyhow as its input, and a few numbers per channel.

Shape legend: V views; M rows (samples times pixels) of a view on this rank; C channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.norm.choose import choose_operations
from model.norm.options import Options, Running


class _TwinBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_VMC: Tensor,
        residual_VMC: Tensor | None,
        weight_C: Tensor,
        bias_C: Tensor,
        running: Running,
        options: Options,
    ) -> Tensor:
        ctx.operations = choose_operations(x_VMC.device, x_VMC.dtype)
        ctx.options, ctx.has_residual = options, residual_VMC is not None
        y_VMC, statistics_KC = ctx.operations.forward(x_VMC, residual_VMC, weight_C, bias_C, running, options)
        ctx.save_for_backward(x_VMC, y_VMC if options.relu else None, weight_C, bias_C, statistics_KC)
        return y_VMC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_VMC: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.operations.backward(
            dy_VMC.contiguous(), *ctx.saved_tensors, ctx.has_residual, ctx.options
        )
        return *gradients, None, None


def twin_batch_norm(
    x_VMC: Tensor,
    residual_VMC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    running: Running,
    options: Options,
) -> Tensor:
    """Normalise each of the V views by its own statistics; (V, M, C) in the dtype of `x_VMC`.

    `x_VMC` and `residual_VMC` are contiguous and of one dtype. `running` is updated as by one pass for each
    view. Gradients for weight and bias are this rank's share of the sum over ranks.
    """
    dtype = torch.promote_types(x_VMC.dtype, torch.float32)
    return _TwinBatchNorm.apply(x_VMC, residual_VMC, weight_C.to(dtype), bias_C.to(dtype), running, options)
