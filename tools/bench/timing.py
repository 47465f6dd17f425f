"""Time on the host and on the GPU, and an endless stream of batches to spend it on."""

import time
from collections.abc import Iterator
from itertools import count, islice, pairwise

import torch

from pipelines.batch import Batch, Loader
from pipelines.config import DataConfig
from train.phases import PhaseClock
from train.readback import Stamp

MIN_WARMUP = 5  # steps or batches; compilers, autotuners and pools of memory settle meanwhile


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def endless(loader: Loader) -> Iterator[Batch]:
    """The batches of epoch 0, 1, 2 and so on."""
    for epoch in count():
        yield from loader.epoch(epoch)


def warmup_batches(config: DataConfig) -> int:
    """How many batches to drop before a loader's speed can be measured.

    More than it holds ready or under way while nobody takes any: those would come faster than it makes them.
    """
    return max(MIN_WARMUP, config.prefetch + config.workers) + 1


def drop(stream: Iterator[Batch], batches: int) -> None:
    """Take that many batches away."""
    for _ in islice(stream, batches):
        pass


def seconds_for(stream: Iterator[Batch], batches: int, device: torch.device) -> float:
    """Wall time in which `stream` delivers that many batches to a consumer that only takes them."""
    synchronise(device)
    start = time.perf_counter()
    drop(stream, batches)
    synchronise(device)
    return time.perf_counter() - start


class PhaseTimer(PhaseClock):
    """Times the phases of every step, and keeps them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._steps: list[list[tuple[str, Stamp]]] = []

    def clear(self) -> None:
        """Forget all steps so far."""
        self._steps.clear()

    def start(self) -> None:
        """Begin a step."""
        super().start()
        self._steps.append(self._stamps)

    def mean_seconds(self) -> dict[str, float]:
        """Mean seconds of each phase over all steps, in the order of the phases; waits for the device."""
        synchronise(self._device)
        totals: dict[str, float] = {}
        for stamps in self._steps:
            for (_, before), (phase, after) in pairwise(stamps):
                totals[phase] = totals.get(phase, 0.0) + after.seconds_since(before)
        return {phase: total / len(self._steps) for phase, total in totals.items()}
