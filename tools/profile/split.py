"""Splits the time of steps into phases, data wait and exposed communication included, without waiting for
the device."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.batch import Batch
from tools.bench.timing import MIN_WARMUP, drop, synchronise
from tools.profile.collectives import Call, gradient_calls, watched
from tools.profile.result import COPY, DATA_WAIT, EXPOSED, IDLE, SPLIT
from train.phases import PhaseClock, phase_range
from train.readback import Stamp
from train.step import TrainStep

Span = tuple[Stamp, Stamp]


@dataclass
class _Step:
    """The moments of one step; those of the host are when it had queued the work, on the device's clock."""

    stamps: list[tuple[str, Stamp]]
    waits: dict[str, list[Span]] = field(default_factory=dict)  # in collectives, by phase
    host_has_batch: Stamp | None = None
    host_is_done: Stamp | None = None


@dataclass(frozen=True)
class Split:
    """What was measured of some steps on this rank."""

    seconds: list[float]  # of each step, from its beginning to that of the next one
    phases: dict[str, float]  # seconds, mean of the steps; they add up to the mean of `seconds`
    calls: dict[Call, float]  # collectives in a step
    host_lead_seconds: float | None  # how far the host is ahead of the GPU at the end of a step; mean

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds) / len(self.seconds)

    @property
    def percentiles(self) -> dict[str, float]:
        return {f"p{p}": float(np.percentile(self.seconds, p)) for p in (10, 50, 90)}


class StepSplitter(PhaseClock):
    """Runs steps of a `TrainStep`, whose `mark` must be this object's.

    data wait               until the loader has handed a batch over, as far as the device has nothing to do
    copy                    only on a GPU: after that, until the batch is there. Loaders copy on a stream of
                            their own, and with DALI the GPU also decodes there: this is what the step waits
    augment ... optimizer   the phases of `TrainStep`, without
    exposed communication   only with several ranks: what the step waits in collectives, other ranks that come
                            late included. For the gradients, from the last one of them to the end of backward
    idle                    what no phase accounts for, between two steps
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._steps: list[_Step] = []
        self._spans: list[Span] = []  # waits in the phase under way
        self._last_gradient: Stamp | None = None
        self._calls: Counter[Call] = Counter()
        # What is queued there comes about at once: the host's time on the device's clock.
        self._empty_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self) -> None:
        super().start()
        self._steps.append(_Step(self._stamps))

    def mark(self, phase: str) -> None:
        if self._last_gradient is not None and phase == "backward":
            self._spans.append((self._last_gradient, Stamp(self._device)))
        super().mark(phase)
        if self._spans:
            self._steps[-1].waits[phase] = self._spans
            self._spans = []

    def run(
        self, train_step: TrainStep, batches: Iterator[Batch], steps: int, to_drop: int = 0
    ) -> Iterator[int]:
        """Do a warm-up and `steps` steps; yields after each one how many of these are done.

        1. the warm-up, during which a loader prepares batches ahead
        2. drop `to_drop` batches without a step
        3. one more step of the warm-up: then loader and step keep the pace that they have in a long run
        4. the measured steps
        """
        hook = self._watch_gradients(train_step.network)
        try:
            with watched(self._device, self._note):
                for step in range(MIN_WARMUP + steps):  # 1
                    if step == MIN_WARMUP - 1:
                        drop(batches, to_drop)  # 2, 3
                    if step == MIN_WARMUP:
                        self._steps.clear()  # 4
                        self._calls.clear()
                    self.start()
                    with phase_range(DATA_WAIT, self._device):
                        batch = next(batches)
                    self._steps[-1].host_has_batch = self._host_stamp()
                    self.mark(DATA_WAIT)
                    train_step(batch, step)
                    self._steps[-1].host_is_done = self._host_stamp()
                    yield max(0, step + 1 - MIN_WARMUP)
            self.start()  # the end of the last one
        finally:
            if hook is not None:
                hook.remove()
        synchronise(self._device)
        self._network = train_step.network

    def split(self) -> Split:
        """Of the steps of the last run."""
        *steps, end = self._steps
        seconds = [b.stamps[0][1].seconds_since(a.stamps[0][1]) for a, b in pairwise([*steps, end])]
        totals = dict.fromkeys(SPLIT, 0.0)
        for step, whole in zip(steps, seconds, strict=True):
            for phase, spent in self._phases(step, whole).items():
                totals[phase] += spent
        known = {phase for step in steps for phase, _ in step.stamps} | {IDLE}
        known |= {COPY} if self._device.type == "cuda" else set()
        is_distributed = isinstance(self._network, DistributedDataParallel)
        known |= {EXPOSED} if is_distributed else set()
        calls = {call: count / len(steps) for call, count in self._calls.items()}
        leads = [step.stamps[-1][1].seconds_since(step.host_is_done) for step in steps if step.host_is_done]
        return Split(
            seconds,
            {phase: total / len(steps) for phase, total in totals.items() if phase in known},
            calls | gradient_calls(self._network),
            sum(leads) / len(leads) if leads else None,
        )

    def _phases(self, step: _Step, whole: float) -> dict[str, float]:
        spent = dict.fromkeys(SPLIT, 0.0)
        for (_, before), (phase, after) in pairwise(step.stamps):
            waited = sum(end.seconds_since(begin) for begin, end in step.waits.get(phase, []))
            spent[phase] += after.seconds_since(before) - waited
            spent[EXPOSED] += waited
        if step.host_has_batch is not None:
            host = step.host_has_batch.seconds_since(step.stamps[0][1])
            waited = spent[DATA_WAIT]
            spent[DATA_WAIT] = min(max(host, 0.0), waited)
            spent[COPY] = waited - spent[DATA_WAIT]
        spent[IDLE] = whole - sum(spent.values())
        return spent

    def _note(self, call: Call, before: Stamp, after: Stamp) -> None:
        self._calls[call] += 1
        self._spans.append((before, after))

    def _host_stamp(self) -> Stamp | None:
        if self._empty_stream is None:
            return None
        with torch.cuda.stream(self._empty_stream):
            return Stamp(self._device)

    def _watch_gradients(self, network: nn.Module) -> torch.utils.hooks.RemovableHandle | None:
        """The first layer's gradient is the last one to come; what follows is the wait for the exchange."""
        if not isinstance(network, DistributedDataParallel):
            return None

        def note(parameter: Tensor) -> None:
            self._last_gradient = Stamp(self._device)

        return next(network.parameters()).register_post_accumulate_grad_hook(note)
