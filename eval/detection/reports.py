"""How a long evaluation tells what it is doing; only the first rank does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from eval.detection.config import DetectionConfig
from model.collectives import is_first_rank

EVERY_SECONDS = 1.0  # between two reports of a phase


@dataclass(frozen=True)
class DetectionReport:
    """How fine-tuning goes; losses are means over the ranks, of one iteration."""

    iteration: int  # done so far
    iterations: int  # in all
    loss: float
    terms: dict[str, float]  # that add up to it, by torchvision's names without "loss_"
    lr: float
    images_per_second: float  # of all ranks
    data_wait_share: float  # of the time, on this rank
    seconds_left: float


@dataclass(frozen=True)
class PhaseReport:
    """How far another phase has come, in steps of its own."""

    phase: str
    done: int
    total: int
    per_second: float
    seconds_left: float


OnReport = Callable[[DetectionReport | PhaseReport], None]


class Pace:
    """Makes the reports of a phase: about one a second, and the last one."""

    def __init__(self, phase: str, total: int, on_report: OnReport | None) -> None:
        self._phase, self._total = phase, total
        self._on_report = on_report if is_first_rank() else None
        self._start = self._last = time.perf_counter()

    def step(self, done: int) -> None:
        now = time.perf_counter()
        if self._on_report is None or (now < self._last + EVERY_SECONDS and done < self._total):
            return
        self._last = now
        rate = done / (now - self._start)
        left = (self._total - done) / rate
        self._on_report(PhaseReport(self._phase, done, self._total, rate, left))


class Meter:
    """Makes the reports of fine-tuning: speed and waiting time since the one before."""

    def __init__(self, config: DetectionConfig, done: int) -> None:
        self._config = config
        self._begin(done)

    def _begin(self, done: int) -> None:
        self._since, self._done, self._waited = time.perf_counter(), done, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def report(self, done: int, terms: dict[str, float], lr: float) -> DetectionReport:
        config = self._config
        seconds = time.perf_counter() - self._since
        per_iteration = seconds / (done - self._done)
        report = DetectionReport(
            done,
            config.iterations,
            sum(terms.values()),
            terms,
            lr,
            config.batch_size / per_iteration,
            self._waited / seconds,
            per_iteration * (config.iterations - done),
        )
        self._begin(done)
        return report
