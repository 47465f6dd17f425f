"""Reports whose numbers the device makes and the host reads later, without waiting for the device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model.loss import BarlowLoss
from train.metrics import StepReport
from train.step import TrainStep


class Readback:
    """The values of a 1-d tensor on their way to the host, and the moment at which they were computed.

    On a GPU both are queued behind the work so far: a copy into pinned memory and an event. On the CPU the
    values are there at once.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._stamp: torch.cuda.Event | float = time.perf_counter()
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._stamp = torch.cuda.Event(enable_timing=True)
            self._stamp.record(torch.cuda.current_stream(values.device))

    def has_arrived(self) -> bool:
        return not isinstance(self._stamp, torch.cuda.Event) or self._stamp.query()

    def read(self) -> list[float]:
        """The values; waits for them where they have not arrived."""
        if isinstance(self._stamp, torch.cuda.Event):
            self._stamp.synchronize()
        return self._values.tolist()

    def seconds_since(self, earlier: "Readback") -> float:
        """Time between the two moments, as the device counts it; both must have arrived."""
        if isinstance(self._stamp, torch.cuda.Event):
            return earlier._stamp.elapsed_time(self._stamp) / 1000
        return self._stamp - earlier._stamp


@dataclass(frozen=True)
class _Measurement:
    """What is known of a report when its step has been queued, and what is still to come from the device."""

    known: dict[str, float]  # fields of `StepReport`
    values: Readback  # the terms of the loss, and the failed step


class Meter:
    """Makes the reports: losses, speed and waiting time between two of them.

    `start` is the step from which this process trains.
    """

    def __init__(self, batch_size: int, total_steps: int, start: int, device: torch.device) -> None:
        self.batch_size, self.total_steps = batch_size, total_steps
        self.began = self.measured_at = time.perf_counter()
        self.waited = 0.0
        self.pending: deque[_Measurement] = deque()
        self.reported_step, self.reported = start, Readback(torch.zeros(1, device=device))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for the loader."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def measure(
        self,
        done: int,
        epoch: int,
        loss: BarlowLoss,
        failed_step: Tensor,
        train_step: TrainStep,
        bad_samples: int,
    ) -> None:
        """Ask for a report of the step that has just been queued, `done` steps into the run.

        `failed_step` (0-d) comes back beside the report.
        """
        weights, biases = train_step.optimizer.param_groups
        now = time.perf_counter()
        known = {
            "step": done,
            "total_steps": self.total_steps,
            "epoch": epoch,
            "lr_weights": weights["lr"],
            "lr_biases": biases["lr"],
            "data_wait_share": self.waited / (now - self.measured_at),
            "bad_samples": bad_samples,
            "seconds": now - self.began,
        }
        values = torch.stack([value.double() for value in (*loss, failed_step)])
        self.pending.append(_Measurement(known, Readback(values)))
        self.measured_at, self.waited = now, 0.0

    def reports(self, wait: bool) -> Iterator[tuple[StepReport, int]]:
        """The reports whose values have arrived, or all of them, in order; each with its `failed_step`."""
        while self.pending and (wait or self.pending[0].values.has_arrived()):
            known, values = vars(self.pending.popleft()).values()
            total, invariance, redundancy, failed_step = values.read()
            steps = known["step"] - self.reported_step
            seconds_per_step = values.seconds_since(self.reported) / steps
            self.reported_step, self.reported = known["step"], values
            yield (
                StepReport(
                    **known,
                    loss=total,
                    invariance=invariance,
                    redundancy=redundancy,
                    pairs_per_second=self.batch_size / seconds_per_step,
                    seconds_left=(self.total_steps - known["step"]) * seconds_per_step,
                ),
                int(failed_step),
            )
