"""The collectives of a step: which there are, how long the step waits in them, how fast each is alone."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tools.bench.timing import synchronise
from train.distributed import World
from train.readback import Stamp

REPEATS = 5  # measured turns of each collective; the median counts
GRADIENTS, STATISTICS, LOSS, OTHER = "gradients", "statistics", "loss", "other"
# Whose code, by the start of its module's name, exchanges what.
_CALLERS = {"model.loss": LOSS, "model.norm": STATISTICS, "torch.nn.modules": STATISTICS, "apex": STATISTICS}
_FRAMES = 12  # to look through for one of them


class Call(NamedTuple):
    """A collective of one kind and size."""

    operation: str  # all_reduce, all_gather or all_to_all
    what: str
    elements: int  # of the tensor: the summed one, the gathered one, or what one rank sends
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


# torch's functions: the operation, and which of their arguments is the tensor.
_WATCHED = {
    "all_reduce": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_to_all_single": ("all_to_all", 1),
}


@contextmanager
def watched(device: torch.device, on_call: Callable[[Call, Stamp, Stamp], None]) -> Iterator[None]:
    """Tell of each collective that Python starts in the block, with the moments before and after it.

    In between, the step waits: the host on the CPU, and on a GPU the stream on which the step's work is
    queued. The exchange of gradients is not among them: `DistributedDataParallel` starts it in C++.
    """

    def call(function: Callable[..., Any], operation: str, place: int, *args: Any, **options: Any) -> Any:
        tensor: Tensor = args[place]
        before = Stamp(device)
        result = function(*args, **options)
        on_call(Call(operation, _purpose(), tensor.numel(), tensor.dtype), before, Stamp(device))
        return result

    with ExitStack() as patches:
        for name, (operation, place) in _WATCHED.items():
            watching = partial(call, getattr(dist, name), operation, place)
            patches.enter_context(patch.object(dist, name, watching))
        yield


def _purpose() -> str:
    """What the code that called is about, by the nearest caller of a known module."""
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            break
        module = frame.f_globals.get("__name__", "")
        for start, what in _CALLERS.items():
            if module.startswith(start):
                return what
        frame = frame.f_back
    return OTHER


def gradient_calls(network: nn.Module) -> Counter[Call]:
    """The all-reduces of one step's gradients, one for each bucket; after the first steps."""
    if not isinstance(network, DistributedDataParallel):
        return Counter()
    known = network._get_ddp_logging_data()
    sizes = known.get("rebuilt_bucket_sizes") or known["bucket_sizes"]
    dtype = next(network.parameters()).dtype
    return Counter(
        Call("all_reduce", GRADIENTS, int(size) // dtype.itemsize, dtype) for size in sizes.split(", ")
    )


def measure_collectives(calls: Mapping[Call, float], world: World) -> list[dict[str, Any]]:
    """Each of them alone, one after the other; `calls` says how often each comes in a step.

    All ranks must call it with the same `calls`. The bandwidth is the tensor's bytes over the time.
    """
    found = []
    for call, count in calls.items():
        run = _collective(call, world)
        run()  # connections and memory
        seconds = median(_seconds(run, world) for _ in range(REPEATS))
        found.append(
            {
                "operation": call.operation,
                "what": call.what,
                "bytes": call.bytes,
                "count": count,
                "seconds": seconds,
                "bytes_per_second": call.bytes / seconds,
            }
        )
    return sorted(found, key=lambda row: -row["count"] * row["seconds"])


def _seconds(run: Callable[[], object], world: World) -> float:
    world.gather(None)  # begin together
    before = Stamp(world.device)
    run()
    after = Stamp(world.device)
    synchronise(world.device)
    return after.seconds_since(before)


def _collective(call: Call, world: World) -> Callable[[], object]:
    """What does the same on tensors of its own; their sizes are rounded up to a multiple of the ranks."""
    share = -(-call.elements // world.size)
    whole, part = (
        torch.zeros(elements, dtype=call.dtype, device=world.device)
        for elements in (share * world.size, share)
    )
    if call.operation == "all_reduce":
        return partial(dist.all_reduce, whole)
    if call.operation == "all_gather":
        return partial(dist.all_gather_into_tensor, whole, part)
    return partial(dist.all_to_all_single, torch.empty_like(whole), whole)
