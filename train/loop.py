"""The training loop: from a config to a trained twin in the run directory, on any number of ranks.

The run directory holds `config.yaml`, `checkpoint.pt` and the one before it, `metrics.jsonl` and
`tensorboard/`.
"""

import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.twin import Twin
from pipelines.batch import Batch, Loader
from pipelines.loaders import build_loader
from train.config import RunConfig, save_config
from train.distributed import World, process_group
from train.files import preparing
from train.flop import model_flop, peak_flops
from train.health import Health
from train.meter import Meter
from train.metrics import MetricsWriter, StepReport
from train.online import open_online_evaluation
from train.phases import PhaseClock
from train.preemption import News, NewsExchange, StopRequest, stop_signals_noted
from train.state import RunState
from train.step import DTYPES, TrainStep

CONFIG_NAME = "config.yaml"
USUAL_SKIPS = 5  # in a row, in fp16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """How a call of `pretrain` ended."""

    checkpoint: Path
    step: int  # global steps that the checkpoint has seen
    steps_done: int  # of these, done by this call; 0 where the run had been finished before
    last_report: StepReport | None
    stopped_by: str | None = None  # the signal that ended it before its last step, such as "SIGTERM"


def pretrain(config: RunConfig, on_step: Callable[[StepReport], None] | None = None) -> RunResult:
    """Train as `config` says, from the run directory's checkpoint if there is one, and save the result.

    Under torchrun each process is one rank. On rank 0 `on_step` receives a report every `train.log_every`
    steps. SIGTERM or SIGUSR1, to any rank, end the run after the step under way, on GPUs two steps later, and
    what has been done is saved. Raises `DataError`, `ModelError` or `TrainingError`, with the last checkpoint
    intact.
    """
    with stop_signals_noted() as stop, process_group(config.train.device) as world:
        configure_backends(config)
        with closing(rank_loader(config, world)) as loader:
            return _Run(config, world, loader, stop).train(on_step)


def rank_loader(config: RunConfig, world: World) -> Loader:
    """This rank's loader of the run; to be closed. Raises `DataError`."""
    return build_loader(
        config.data,
        seed=config.seed,
        batch_size=config.train.batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )


def configure_backends(config: RunConfig) -> None:
    """Set CUDA's libraries up for the run: shapes never change, and fp32 is not rounded to TensorFloat-32.

    In the half precisions, where most operands are rounded further, what remains in float32 may be.
    """
    torch.backends.cudnn.benchmark = True
    is_half = DTYPES[config.train.precision].itemsize == 2
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = is_half


def build_twin(config: RunConfig, device: torch.device) -> Twin:
    """The untrained network of a run, in channels-last format: the seed fixes its weights.

    They are float32, whatever autocast makes of them, or float64.
    """
    torch.manual_seed(config.seed)
    dtype = torch.promote_types(DTYPES[config.train.precision], torch.float32)
    return Twin(config.model).to(device, dtype, memory_format=torch.channels_last)


def over_ranks(twin: Twin, config: RunConfig, world: World) -> nn.Module:
    """The network with gradients, and statistics of the norms in `model.sync_bn`, over all ranks."""
    if world.size == 1:
        return twin
    twin.synchronise_norms()
    return DistributedDataParallel(
        twin,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        # Norms that are synchronised keep their buffers equal.
        forward_sync_buffers=config.model.sync_bn != "all",
        gradient_as_bucket_view=True,
    )


class _Run:
    """One rank's part of a run. Steps count from 0 while they are done, and as "steps done" afterwards."""

    def __init__(self, config: RunConfig, world: World, loader: Loader, stop: StopRequest) -> None:
        self.config, self.world, self.loader, self.stop = config, world, loader, stop
        self.exchange = NewsExchange(world)
        self.health = Health()
        self.skipped_steps = 0
        self.total_steps = config.train.epochs * loader.steps_per_epoch
        if config.train.max_steps is not None:
            self.total_steps = min(self.total_steps, config.train.max_steps)
        self.twin = build_twin(config, world.device)
        self.probe, self.knn = open_online_evaluation(config, self.twin, world)
        self.clock = PhaseClock(world.device)
        self.train_step = TrainStep(
            config,
            over_ranks(self.twin, config, world),
            loader.steps_per_epoch,
            mark=self.clock.mark,
            keep_features=self.probe is not None,
        )
        self.state = RunState(config, world, self.twin, self.train_step, self.probe, loader)

    def train(self, on_step: Callable[[StepReport], None] | None) -> RunResult:
        """1. resume  2. step after step  3. the ranks tell each other how they fare, and whether to stop
        4. a report now and then  5. a checkpoint now and then

        The host does not wait for the device to finish a step: news and reports follow, some steps later,
        once their values have arrived. Only before a checkpoint, and so at the end, all reports are waited
        for.
        """
        start = self.state.resume()  # 1
        if start >= self.total_steps:
            return RunResult(self.state.checkpoint, start, 0, None)
        report = stopped_by = None
        meter = self._build_meter(start)
        with self._open_metrics(start) as write:
            for step, batch in self._batches(start, meter):
                done = step + 1
                must_report = self._is_report_due(done, start)
                if must_report:
                    self.clock.start()
                loss = self.train_step(batch, step)  # 2
                meter.note(loss)
                if self.probe is not None:
                    self.probe.learn(self.train_step.features_NF, batch.labels_N)
                news = self._exchange_news(done)  # 3
                self._watch_skipped_steps(news)
                if news.stop_signal and done < self.total_steps:
                    stopped_by = signal.Signals(news.stop_signal).name
                is_last = stopped_by is not None or done == self.total_steps
                if is_last:
                    for late in self.exchange.rest():
                        self._watch_skipped_steps(late)
                must_report |= is_last
                if must_report:  # 4
                    meter.measure(
                        done,
                        step // self.loader.steps_per_epoch,
                        loss,
                        bad_samples=len(self.loader.bad_samples),
                        skipped_steps=self.skipped_steps,
                        phases=self.clock.take(),
                    )
                if self._is_knn_due(done):
                    self._measure_knn(meter)
                must_save = is_last or self.state.is_wanted(news) or self._is_checkpoint_due(done)
                for report in meter.reports(wait=must_save):
                    if self.world.is_main:
                        write(report)
                        for sentence in self.health.look(report):
                            _log.warning("Step %d: %s.", report.step, sentence)
                        if on_step is not None:
                            on_step(report)
                if must_save:  # 5
                    self.state.save(done, is_last)
                if is_last:
                    # When one rank ends, launchers end the others: none may before the checkpoint is whole.
                    self.world.gather(None)
                    break
        last_report = report if self.world.is_main else None
        return RunResult(self.state.checkpoint, done, done - start, last_report, stopped_by)

    def _batches(self, start: int, meter: Meter) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from step `start` to the last one of the run."""
        per_epoch = self.loader.steps_per_epoch
        for epoch in range(start // per_epoch, math.ceil(self.total_steps / per_epoch)):
            first = max(start, epoch * per_epoch)
            batches = iter(self.loader.epoch(epoch, first - epoch * per_epoch))
            for step in range(first, min((epoch + 1) * per_epoch, self.total_steps)):
                with meter.waiting():
                    batch = next(batches)
                yield step, batch

    def _exchange_news(self, done: int) -> News:
        """Also waits for nothing; what is not known yet is good news."""
        state, skipped = self.state, self.train_step.skipped_in_row
        news = self.exchange.exchange(done, self.stop.signal, state.wants_saving, state.saved_step, skipped)
        state.saved_step = max(state.saved_step, news.saved_step)
        return news

    def _watch_skipped_steps(self, news: News) -> None:
        if not news.skipped_in_row:
            return
        self.skipped_steps += 1
        if news.skipped_in_row > self.config.train.max_skipped_steps:
            raise self.state.failure("loss or its gradient", news.step)
        # In fp16 that is how the scaler finds its scale.
        is_usual = self.train_step.scaler.is_enabled() and news.skipped_in_row < USUAL_SKIPS
        if self.world.is_main and not is_usual:
            _log.warning("Step %d was skipped: its loss or gradient is not finite.", news.step)

    def _is_report_due(self, done: int, start: int) -> bool:
        is_regular = done == start + 1 or done % self.config.train.log_every == 0
        return is_regular or self._is_knn_due(done)

    def _is_knn_due(self, done: int) -> bool:
        every = self.config.eval.online.knn_every_epochs * self.loader.steps_per_epoch
        return self.knn is not None and done % every == 0

    def _is_checkpoint_due(self, done: int) -> bool:
        every = self.config.train.checkpoint.every_steps
        return done % self.loader.steps_per_epoch == 0 or (every is not None and done % every == 0)

    def _measure_knn(self, meter: Meter) -> None:
        """Rank 0 does it, and the others wait for it in the collectives of their next step."""
        if self.world.is_main:
            meter.add_knn_accuracy(self.knn.accuracy(self.twin.backbone))
        meter.restart()

    def _build_meter(self, start: int) -> Meter:
        config, world = self.config, self.world
        peak = flop = None
        if world.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(world.device), config.train.precision)
        if peak is not None:
            flop = model_flop(config.model, 2, config.data.image_size) / 2
            peak *= world.size
        return Meter(
            config.train.batch_size,
            self.total_steps,
            start,
            self.train_step,
            world.device,
            ranks=world.size,
            probe=self.probe,
            flop_per_pair=flop,
            peak_flops=peak,
            has_correlations=config.model.loss.normalise != "none" and config.model.loss.temperature is None,
        )

    @contextmanager
    def _open_metrics(self, start: int) -> Iterator[Callable[[StepReport], None]]:
        """Prepare the run directory; gives the function that writes a report. Only rank 0 does either."""
        if not self.world.is_main:
            yield lambda report: None
            return
        run_dir = self.config.run_dir
        with preparing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            save_config(self.config, run_dir / CONFIG_NAME)
            settings = self.config.model_dump(mode="json")
            writer = MetricsWriter(run_dir, start, self.config.train.wandb, settings)
        with closing(writer):
            yield writer.write
