"""The few collectives that the model needs, out of place, and no-ops where there is one process."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, as a new tensor that autograd does not follow."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def gather_rows(x_nD: Tensor) -> Tensor:
    """Rows of all ranks stacked in rank order, (W * n, D); every rank must hold the same number of rows.

    Autograd does not follow it.
    """
    if world_size() == 1:
        return x_nD.detach()
    n, width = x_nD.shape
    rows_ND = x_nD.new_empty(world_size() * n, width)
    dist.all_gather_into_tensor(rows_ND, x_nD.detach().contiguous())
    return rows_ND


class _DifferentiableSum(torch.autograd.Function):
    """Sum over ranks of a value that every rank goes on to use in its own part of the objective.

    The objective is the sum over ranks of what each computes, so the gradient of a summand is the sum over
    ranks of the gradients that the total received.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return sum_over_ranks(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return sum_over_ranks(grad)


def differentiable_sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, for values that each rank uses in its own share of the objective."""
    return _DifferentiableSum.apply(x) if world_size() > 1 else x
