"""The phases of a training step: on a clock, and as ranges in timelines."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from train.readback import Stamp


class PhaseClock:
    """Times the phases of those steps for which it is started, and costs nothing in the others.

    It never waits for the device. On a GPU the stamps are events in its queue, so a phase's time is the GPU's
    own: from the end of the phase before it to its end, idle time included. A phase "data wait" is then how
    long the GPU stood still for want of a batch, not how long the host waited.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stamps: list[tuple[str, Stamp]] = []

    def start(self) -> None:
        """Time the step that comes next."""
        self._stamps = [("start", Stamp(self._device))]

    def mark(self, phase: str) -> None:
        """The work of a phase has been queued; all since the last call belongs to it. For `TrainStep`."""
        if self._stamps:
            self._stamps.append((phase, Stamp(self._device)))

    def take(self) -> list[tuple[str, Stamp]]:
        """The start and the ends of the phases of the step just timed; stops the clock."""
        stamps, self._stamps = self._stamps, []
        return stamps


@contextmanager
def phase_range(phase: str, device: torch.device) -> Iterator[None]:
    """Show what runs inside as `phase` in torch's profiler (Perfetto) and, as NVTX, in Nsight Systems."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.nvtx.range_push(phase)
    try:
        with record_function(phase):
            yield
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()
