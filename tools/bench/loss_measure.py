"""One rank's measurements of the loss: time, memory, precision and traffic of every variant.

Shape legend: n samples of a rank, N of the global batch, D embedding width, d columns of a rank.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product as combinations
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.collectives import column_shares, gather_rows, world_size
from model.config import LossConfig
from model.loss import ALGORITHMS, barlow_loss
from model.loss.choose import IMPLEMENTATIONS, choose_operations, plan_at_hand
from model.loss.plan import Plan
from model.loss.products import product
from model.loss.reference import reference_loss
from pipelines.errors import DataError
from tools.bench.authors import AuthorsLoss
from tools.bench.memory import is_out_of_memory, peak_bytes, return_freed_memory
from tools.bench.timing import synchronise
from tools.bench.traffic import TrafficMeter
from train.distributed import World

AUTHORS = "authors", "torch"
CACHE_BYTES = 256 << 20  # more than any cache holds
QUEUE_AHEAD_CYCLES = 100_000_000  # about 50 ms of a GPU, many times what the host needs to queue a call
LOSS_SCALES = {torch.float16: 1024.0}  # what a gradient scaler would do: float16 has few small numbers

Variant = tuple[str, str]  # algorithm, implementation
Loss = Callable[[Tensor, Tensor], Tensor]


class Task(NamedTuple):
    """One size of embeddings, and what to measure on it."""

    samples: int  # of the global batch, N
    width: int
    dtype: torch.dtype
    algorithms: tuple[str, ...]  # none: those of the plan
    repeats: int


class Measured(NamedTuple):
    """What one rank has found."""

    seconds: dict[Variant, list[float]]
    products_seconds: dict[str, list[float]]  # by algorithm
    errors: dict[Variant, float | None]  # of the gradient; empty but on rank 0
    sent: dict[Variant, int]  # bytes; empty but among CPU ranks
    peaks: dict[Variant, int]  # bytes; empty on the CPU
    plan: Plan


@contextmanager
def _refusing_what_does_not_fit(task: Task) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # On the CPU torch has no error of its own for this.
        if not is_out_of_memory(error):
            raise
        raise DataError(
            f"The loss for N = {task.samples} and width {task.width} does not fit into memory (the authors' "
            "formulation holds several matrices of width x width elements); choose a smaller width or fewer "
            "samples."
        ) from error


def measure(task: Task, world: World, done: Callable[[int], None] | None = None) -> Measured:
    """All of one rank's measurements but its memory on the CPU; `done` hears how many rounds are over.

    Raises `DataError` where memory does not suffice.
    """
    with _refusing_what_does_not_fit(task):
        return _measure(task, world, done)


def _measure(task: Task, world: World, done: Callable[[int], None] | None) -> Measured:
    planned = plan_at_hand(task.samples, task.width, world.size, task.dtype, world.device)
    losses, views = _losses(task, world), _views(task, world)
    calls: dict[Any, Callable[[], Any]] = {
        variant: partial(_gradients, loss, *views) for variant, loss in losses.items()
    }
    errors = _gradient_errors(task, world, calls)
    sent, peaks = {}, {}
    if world.device.type == "cuda":
        peaks = {variant: peak_bytes(call, world.device) for variant, call in calls.items()}
    elif world.size > 1:
        sent = {variant: _bytes_sent(call) for variant, call in calls.items()}
    algorithms = dict.fromkeys(algorithm for algorithm, _ in losses if algorithm in ALGORITHMS)
    calls.update({algorithm: _products(algorithm, task, world) for algorithm in algorithms})
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=world.device)
    for turn in range(1 + task.repeats):
        for name, call in calls.items():
            elapsed = _seconds(call, flush)
            if turn > 0:  # the first warms up
                seconds[name].append(elapsed)
        if done is not None:
            done(turn + 1)
    products_seconds = {algorithm: seconds.pop(algorithm) for algorithm in algorithms}
    return Measured(seconds, products_seconds, errors, sent, peaks, planned)


def measure_peaks(task: Task, world: World) -> dict[Variant, int]:
    """Bytes that each variant takes on this rank, beyond its inputs; only in a fresh process on the CPU.

    Raises `DataError` where memory does not suffice.
    """
    return_freed_memory()
    with _refusing_what_does_not_fit(task):
        views = _views(task, world)
        return {
            variant: peak_bytes(partial(_gradients, loss, *views), world.device)
            for variant, loss in _losses(task, world).items()
        }


def _views(task: Task, world: World) -> list[Tensor]:
    """This rank's rows of two correlated views with uneven means; the batch does not depend on the ranks."""
    generator = torch.Generator(world.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=world.device)

    shared_ND, mean_D = normal(task.samples, task.width), normal(task.width)
    views_ND = [shared_ND + 0.5 * normal(task.samples, task.width) + mean_D for _ in range(2)]
    return [z_ND.to(task.dtype).chunk(world.size)[world.rank].clone().requires_grad_() for z_ND in views_ND]


def _losses(task: Task, world: World) -> dict[Variant, Loss]:
    """The authors' loss first, then every algorithm in every implementation that serves the device."""
    algorithms = task.algorithms or tuple(name for name in ALGORITHMS if world.size > 1 or name != "sharded")
    weight = LossConfig().off_diagonal_weight
    losses: dict[Variant, Loss] = {AUTHORS: AuthorsLoss(task.width, task.samples, weight, world.device)}
    implementations = [
        name
        for name, module in IMPLEMENTATIONS.items()
        if (name != "triton" or world.device.type == "cuda")
        and choose_operations(name, world.device, task.dtype).__name__ == module
    ]
    for algorithm, implementation in combinations(algorithms, implementations):
        config = LossConfig(algorithm=algorithm, implementation=implementation)
        losses[algorithm, implementation] = partial(_total, config)
    return losses


def _total(config: LossConfig, z_a_nD: Tensor, z_b_nD: Tensor) -> Tensor:
    return barlow_loss(z_a_nD, z_b_nD, config).total


def _gradients(loss: Loss, z_a_nD: Tensor, z_b_nD: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward: the gradients for both views, times the loss scale of their precision."""
    total = loss(z_a_nD, z_b_nD)
    scale = torch.full_like(total, LOSS_SCALES.get(z_a_nD.dtype, 1.0))
    return torch.autograd.grad(total, (z_a_nD, z_b_nD), scale)


def _gradient_errors(
    task: Task, world: World, calls: dict[Variant, Callable[[], tuple[Tensor, ...]]]
) -> dict[Variant, float | None]:
    """Distance of each gradient of the global batch from the definition's in float64, relative to its norm.

    None for a gradient that is not finite. Only rank 0 knows.
    """
    gathered = {variant: [gather_rows(grad_nD) for grad_nD in call()] for variant, call in calls.items()}
    if not world.is_main:
        return {}
    whole = _views(task, World(0, 1, world.device))
    views = [z_ND.detach().double().requires_grad_() for z_ND in whole]
    truth = torch.cat(torch.autograd.grad(reference_loss(*views, LossConfig())[0], views))
    truth *= LOSS_SCALES.get(task.dtype, 1.0)
    norm = torch.linalg.vector_norm(truth)
    errors = {}
    for variant, grads in gathered.items():
        error = float(torch.linalg.vector_norm(torch.cat(grads).double() - truth) / norm)
        errors[variant] = error if math.isfinite(error) else None
    return errors


def _bytes_sent(call: Callable[[], Any]) -> int:
    dist.barrier()
    meter = TrafficMeter()
    call()
    return meter.bytes_sent()


def _products(algorithm: str, task: Task, world: World) -> Callable[[], Any]:
    """The matrix products of one rank's forward and backward pass, and nothing else."""
    N, D = task.samples, task.width
    n, d = N // world.size, column_shares(D)[world.rank]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=world.device).to(task.dtype)

    if algorithm == "dense":
        a_nD, b_nD, m_DD = random(n, D), random(n, D), random(D, D)
        return lambda: (product(a_nD.T, b_nD), product(b_nD, m_DD.T), product(a_nD, m_DD))
    rows, columns = (n, D) if algorithm == "gram" else (N, d)
    a, b, k_a, k_b = random(N, columns), random(N, columns), random(rows, N), random(rows, N)
    return lambda: (product(a[:rows], a.T), product(b[:rows], b.T), product(k_b, a), product(k_a, b))


def _seconds(call: Callable[[], Any], flush: Tensor) -> float:
    """Time of one call with cold caches, started by all ranks together.

    On a GPU it is the time between two events in a queue that is filled while the GPU still waits before the
    first of them, so the host's time to launch kernels does not count.
    """
    flush.zero_()
    if world_size() > 1:
        dist.barrier()
    synchronise(flush.device)
    if flush.device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE_AHEAD_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
