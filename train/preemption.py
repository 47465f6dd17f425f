"""Stopping in good order when a scheduler asks for it, at the same step on every rank.

Schedulers announce the end of a job by SIGTERM or SIGUSR1, perhaps to some of its processes only. A rank that
stopped by itself would leave the others waiting for it in their next collective; so after each step the ranks
tell each other what they wish and how they fare.
"""

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed import World
from train.readback import Readback

STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1
LAG = 2  # steps after which a GPU's news are read: it has passed them by then, and the host need not wait


@dataclass
class StopRequest:
    """The latest stop signal that this process has received; 0 as long as there is none."""

    signal: int = 0


@contextmanager
def stop_signals_noted() -> Iterator[StopRequest]:
    """Within the block, `STOP_SIGNALS` are noted instead of ending the process, those that were blocked, too.

    Only the main thread can receive signals: in another one nothing is ever noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield request
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in previous.items():
            signal.signal(number, handler)


class News(NamedTuple):
    """What the ranks told each other after a step: of each number the largest of all ranks."""

    step: int  # global steps done at that time
    stop_signal: int  # 0 where no rank has received one
    wants_checkpoint: bool
    saved_step: int  # of the last checkpoint that is known to be good; -1 for none
    skipped_in_row: int  # steps up to this one that changed nothing, as their gradients were not finite


class NewsExchange:
    """After every step each rank tells, and every rank learns the same at the same step.

    On GPUs the news of a step are read `LAG` steps later, so that the host does not wait for the device.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._lag = LAG if world.device.type == "cuda" else 0
        self._coming: deque[tuple[int, Readback]] = deque()

    def exchange(
        self, done: int, stop_signal: int, wants_checkpoint: bool, saved_step: int, skipped_in_row: Tensor
    ) -> News:
        """Tell this rank's news after `done` steps, and hear what is known by now: in the first `LAG` steps
        nothing, which is good news.

        `skipped_in_row` is a 0-d tensor on the device.
        """
        device = self._world.device
        numbers = (float(stop_signal), float(wants_checkpoint), float(saved_step))
        told = [torch.full((), number, dtype=torch.float64, device=device) for number in numbers]
        news = torch.stack([*told, skipped_in_row.double()])
        if self._world.size > 1:
            dist.all_reduce(news, dist.ReduceOp.MAX)
        self._coming.append((done, Readback(news)))
        return self._hear() if len(self._coming) > self._lag else News(0, 0, False, -1, 0)

    def rest(self) -> list[News]:
        """What has been told and not heard yet; waits for it."""
        return [self._hear() for _ in range(len(self._coming))]

    def _hear(self) -> News:
        step, values = self._coming.popleft()
        stop_signal, wants_checkpoint, saved_step, skipped = map(int, values.read())
        return News(step, stop_signal, bool(wants_checkpoint), saved_step, skipped)
