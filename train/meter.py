"""Reports whose numbers the device makes and the host reads later, without waiting for the device.

Shape legend: N samples of this rank, D embedding width.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model.loss import BarlowLoss
from model.loss.objective import EPS
from train.metrics import StepReport
from train.phases import phase_range
from train.probe import OnlineProbe
from train.readback import Readback, Stamp
from train.step import TrainStep

GIB = 2**30


@dataclass(frozen=True)
class _Measurement:
    """What is known of a report when its step has been queued, and what is still to come from the device."""

    known: dict[str, float]  # fields of `StepReport`
    names: list[str]  # more of them, whose values are to come
    values: Readback
    since: Stamp  # the speed is that of `steps` steps from then on
    steps: int
    phases: list[tuple[str, Stamp]] = field(default_factory=list)


class Meter:
    """Makes the reports: losses, accuracy, speed and waiting time between two of them.

    `start` is the step from which this process trains, `batch_size` the global one. `flop_per_pair` are the
    operations of the network for one pair, and `peak_flops` what all GPUs could do per second; without both
    no utilisation is reported. `has_correlations` says whether the terms of the loss are made of the elements
    of C, as in the paper.
    """

    def __init__(
        self,
        batch_size: int,
        total_steps: int,
        start: int,
        train_step: TrainStep,
        device: torch.device,
        *,
        ranks: int = 1,
        probe: OnlineProbe | None = None,
        flop_per_pair: float | None = None,
        peak_flops: float | None = None,
        has_correlations: bool = True,
    ) -> None:
        self.batch_size, self.total_steps, self.ranks = batch_size, total_steps, ranks
        self.train_step, self.probe, self.device = train_step, probe, device
        self.flop_per_pair, self.peak_flops = flop_per_pair, peak_flops
        self.has_correlations = has_correlations
        self.largest_loss = torch.full((), float("nan"), device=device)
        self.began = time.perf_counter()
        self.pending: deque[_Measurement] = deque()
        self.last_step = start
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last report: it was not spent on training."""
        self.measured_at, self.since, self.waited = time.perf_counter(), Stamp(self.device), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for the loader."""
        began = time.perf_counter()
        with phase_range("data wait", self.device):
            yield
        self.waited += time.perf_counter() - began

    def note(self, loss: BarlowLoss) -> None:
        """After each step: keeps the largest loss since the last report."""
        self.largest_loss = torch.fmax(self.largest_loss, loss.total)

    def measure(
        self,
        done: int,
        epoch: int,
        loss: BarlowLoss,
        *,
        bad_samples: int = 0,
        skipped_steps: int = 0,
        phases: Sequence[tuple[str, Stamp]] = (),
    ) -> None:
        """Ask for a report of the step that has just been queued, `done` steps into the run.

        `phases` are those of a `PhaseClock`, or none.
        """
        weights, biases = self.train_step.optimizer.param_groups
        now = time.perf_counter()
        known = {
            "step": done,
            "total_steps": self.total_steps,
            "epoch": epoch,
            "lr_weights": weights["lr"],
            "lr_biases": biases["lr"],
            "data_wait_share": self.waited / (now - self.measured_at),
            "bad_samples": bad_samples,
            "skipped_steps": skipped_steps,
            "seconds": now - self.began,
            "exposed_communication_ms": _exposed_communication_ms(self.train_step),
        }
        if self.device.type == "cuda":
            known["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        steps = done - self.last_step
        coming = dict(zip(("loss", "invariance", "redundancy"), loss, strict=True))
        coming["largest_loss"] = self.largest_loss
        coming |= _spread(self.train_step.z_a_ND)
        D = self.train_step.z_a_ND.shape[1]
        if self.has_correlations:
            coming["diagonal_error"] = (loss.invariance / D).sqrt()
            coming["off_diagonal"] = (loss.redundancy / max(D * (D - 1), 1)).sqrt()
        if self.train_step.scaler.is_enabled():
            # `get_scale` would wait for the device. It is a tensor since the first step.
            coming["gradient_scale"] = self.train_step.scaler._scale
        if self.probe is not None:
            coming["probe_accuracy"] = self.probe.right / (steps * self.batch_size)
        values = Readback(torch.stack([value.double().view(()) for value in coming.values()]))
        if self.probe is not None:
            self.probe.right.zero_()
        self.largest_loss.fill_(float("nan"))
        self.pending.append(_Measurement(known, list(coming), values, self.since, steps, list(phases)))
        self.last_step, self.measured_at, self.since, self.waited = done, now, values.stamp, 0.0

    def add_knn_accuracy(self, accuracy: float) -> None:
        """To the report asked for last, which must not have been given out."""
        self.pending[-1].known["knn_accuracy"] = accuracy

    def reports(self, wait: bool) -> Iterator[StepReport]:
        """The reports whose values have arrived, or all of them, in order."""
        while self.pending and (wait or self.pending[0].values.has_arrived()):
            measured = self.pending.popleft()
            values = measured.values.read()
            seconds_per_step = measured.values.stamp.seconds_since(measured.since) / measured.steps
            pairs_per_second = self.batch_size / seconds_per_step
            speed: dict[str, float] = {}
            if self.device.type == "cuda":
                speed["pairs_per_second_per_gpu"] = pairs_per_second / self.ranks
            if self.flop_per_pair and self.peak_flops:
                speed["mfu"] = self.flop_per_pair * pairs_per_second / self.peak_flops
            yield StepReport(
                **measured.known,
                **dict(zip(measured.names, values, strict=True)),
                **speed,
                pairs_per_second=pairs_per_second,
                seconds_left=(self.total_steps - measured.known["step"]) * seconds_per_step,
                phase_ms={
                    phase: 1000 * end.seconds_since(before)
                    for (_, before), (phase, end) in pairwise(measured.phases)
                },
            )


def _spread(z_a_ND: Tensor) -> dict[str, Tensor]:
    """How much the features of this rank's embeddings vary."""
    variance_D = z_a_ND.float().var(dim=0, unbiased=False)
    return {"embedding_std": variance_D.sqrt().mean(), "dead_features": (variance_D < EPS).float().mean()}


def _exposed_communication_ms(train_step: TrainStep) -> float | None:
    """How long a backward pass waited for the exchange of gradients once its own work was done.

    `DistributedDataParallel` measures it in the first steps, and then in each hundredth; this is the latest
    figure. None before there is one.
    """
    if not isinstance(train_step.network, DistributedDataParallel):
        return None
    measured = train_step.network._get_ddp_logging_data()  # in nanoseconds
    if "backward_comm_time" not in measured:
        return None
    return (measured["backward_comm_time"] - measured["backward_compute_comm_overlap_time"]) / 1e6
