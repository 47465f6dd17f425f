"""The few collectives that the model needs, and no-ops where there is one process.

Autograd follows none of them but `differentiable_sum_over_ranks`.

Shape legend: W ranks, n rows of this rank, N = W n rows of all, D columns, d columns of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import ModelError


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this is rank 0, or the only one."""
    return world_size() == 1 or dist.get_rank() == 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks; `x` keeps its values (and is the sum where there is one process)."""
    return x.detach() if world_size() == 1 else sum_over_ranks_(x.detach().clone())


def sum_over_ranks_(x: Tensor) -> Tensor:
    """Sum of the contiguous `x` over all ranks, in its place: for large tensors that nobody else holds."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def from_first_rank(value: int, device: torch.device) -> int:
    """The first rank's `value`, on every rank; waits for the device where there are several."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, 0)
    return int(shared)


def object_from_first_rank(value: Any) -> Any:
    """The first rank's `value`, anything that can be pickled, on every rank; tensors should be on the CPU."""
    if world_size() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def objects_of_all_ranks(value: Any) -> list[Any]:
    """Every rank's `value`, anything that can be pickled, in rank order; tensors should be on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(x_nD: Tensor) -> Tensor:
    """Rows of all ranks stacked in rank order, (N, D); every rank must hold the same number of rows."""
    if world_size() == 1:
        return x_nD.detach()
    rows_ND = x_nD.new_empty(world_size() * len(x_nD), x_nD.shape[1])
    dist.all_gather_into_tensor(rows_ND, x_nD.detach().contiguous())
    return rows_ND


def column_shares(width: int) -> list[int]:
    """How many of `width` columns each rank owns; they differ by at most one."""
    share, rest = divmod(width, world_size())
    return [share + (rank < rest) for rank in range(world_size())]


def column_range(width: int) -> slice:
    """Which of `width` columns this rank owns."""
    if world_size() == 1:
        return slice(0, width)
    rank, shares = dist.get_rank(), column_shares(width)
    start = sum(shares[:rank])
    return slice(start, start + shares[rank])


def rows_to_columns(x_nD: Tensor) -> Tensor:
    """From this rank's rows to all ranks' rows of its share of the columns, (N, d).

    Every rank must hold the same number of rows.
    """
    if world_size() == 1:
        return x_nD.detach()
    n, width = x_nD.shape
    shares = column_shares(width)
    d = shares[dist.get_rank()]
    sent = torch.cat([part_nd.reshape(-1) for part_nd in x_nD.detach().split(shares, dim=1)])
    received_Nd = x_nD.new_empty(world_size() * n, d)
    dist.all_to_all_single(
        received_Nd.view(-1), sent, [n * d] * world_size(), [n * share for share in shares]
    )
    return received_Nd


def columns_to_rows(x_Nd: Tensor, width: int) -> Tensor:
    """The inverse of `rows_to_columns`: this rank's rows of all `width` columns, (n, width)."""
    if world_size() == 1:
        return x_Nd.detach()
    num_rows, d = x_Nd.shape
    n, shares = num_rows // world_size(), column_shares(width)
    received = x_Nd.new_empty(n * width)
    sizes = [n * share for share in shares]
    dist.all_to_all_single(received, x_Nd.detach().reshape(-1), sizes, [n * d] * world_size())
    parts = zip(received.split(sizes), shares, strict=True)
    return torch.cat([part.view(n, share) for part, share in parts], dim=1)


class EqualRows:
    """Refuses ranks that hold different numbers of rows, before a collective hangs on them.

    Every call exchanges the counts, but looks at them, for which an accelerator makes the host wait, only
    where this rank's count is not that of its last call: if all were equal then and are not now, some rank's
    count has changed, and that rank ends the run.
    """

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None

    def check(self, rows: int, device: torch.device) -> None:
        """Raises `ModelError` where another rank holds another number of rows; all ranks must call it."""
        W = world_size()
        if W == 1:
            return
        counts_W = torch.zeros(W, dtype=torch.int64, device=device)
        counts_W[dist.get_rank()] = rows
        dist.all_reduce(counts_W)
        if self._last == (W, rows) and device.type != "cpu":
            return
        counts = counts_W.tolist()
        if len(set(counts)) > 1:
            listed = ", ".join(map(str, counts))
            raise ModelError(
                f"The loss needs the same number of samples on every rank, not {listed} on ranks 0 to "
                f"{W - 1}; drop the last, smaller batch."
            )
        self._last = W, rows


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
