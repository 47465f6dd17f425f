"""Measures a run, part by part: `fastbarlow profile`."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.loss.choose import choose_algorithm
from pipelines.batch import Batch
from tools.bench.loader_usage import cpu_seconds
from tools.bench.timing import drop, endless, warmup_batches
from tools.environment import describe_environment
from tools.profile.ceilings import loader_ceiling, stage_ceilings
from tools.profile.collectives import measure_collectives
from tools.profile.kernels import trace_steps
from tools.profile.page import write_page
from tools.profile.peaks import measure_peaks
from tools.profile.ranks import gather_ranks
from tools.profile.result import make_folder, write_profile
from tools.profile.split import Split, StepSplitter
from tools.profile.utilisation import Sampler
from tools.profile.verdict import judge
from train.config import RunConfig
from train.distributed import World, process_group
from train.errors import TrainingError
from train.launch import launch_ranks
from train.loop import build_twin, configure_backends, over_ranks, rank_loader
from train.preemption import StopRequest, stop_signals_noted
from train.step import TrainStep

TRACED_STEPS = 3
SYNTHETIC_BATCHES = 4  # enough that their numbers differ, made before the clock starts
PROGRESS_SECONDS = 0.5


class Progress(NamedTuple):
    part: str
    done: int = 0  # steps of the part
    steps: int | None = None  # all of them, where it has steps


OnProgress = Callable[[Progress], None]


def launch_profile(
    config: RunConfig, steps: int, out: Path, processes: int, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """`profile_run` on that many ranks of this machine, each a process."""
    return launch_ranks(partial(profile_run, config, steps, out), processes, on_progress)


def profile_run(
    config: RunConfig, steps: int, out: Path, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Measure the run of `config` with an untrained network and write the profile into `out`.

    First each part alone:
    1. the stages of loading
    2. the step, on synthetic batches that are ready beforehand
    3. the collectives of that step, with several ranks
    4. the loader as a whole
    Then
    5. the real thing: loader and step together, each step split into phases, while the machine's use is
       sampled
    6. what the device reaches at best, and some steps alone under torch's profiler, which slows them down;
       each rank writes a trace of its own
    7. the verdict and the files

    2, 4 and 5 measure `steps` steps after a warm-up. That of 4 and 5 also takes away what the loader has
    prepared ahead, which would look faster than batches can be made. Under torchrun each process is one rank,
    and all take part; rank 0 writes the files and calls `on_progress`. The run's checkpoint is neither read
    nor written.

    Returns the profile; `run` is of this rank. Raises `DataError`, `ModelError` or `TrainingError`.
    """
    with stop_signals_noted() as stop, process_group(config.train.device) as world:
        tell = _Teller(on_progress if world.is_main else None, stop)
        configure_backends(config)
        batch = config.train.batch_size // world.size
        with closing(rank_loader(config, world)) as loader:
            make_folder(out)
            tell("the stages of loading")  # 1
            ceilings, dataset = stage_ceilings(config, world)

            splitter = StepSplitter(world.device)
            network = over_ranks(build_twin(config, world.device).train(), config, world)
            train_step = TrainStep(config, network, loader.steps_per_epoch, mark=splitter.mark)
            ready = _ready_batches(config, world)
            alone, ceilings["step"] = _step_ceiling(splitter, train_step, ready, steps, batch, tell)  # 2

            collectives = []
            if world.size > 1:
                tell("the collectives alone")  # 3
                collectives = measure_collectives(alone.calls, world)

            tell("the loader alone")  # 4
            with closing(endless(loader)) as stream:
                warmup = warmup_batches(config.data)
                drop(stream, warmup)
                world.gather(None)
                ceilings["loader"] = loader_ceiling(stream, steps, batch, world.device)

                with Sampler(world.device) as sampler:
                    for done in splitter.run(train_step, stream, steps, to_drop=warmup):  # 5
                        if not done:
                            sampler.clear()  # the device has stood still in the warm-up
                        tell("loader and step together", done, steps)
                split = splitter.split()

        tell("what the device can reach, and kernels")  # 6
        world.gather(None)
        peaks = measure_peaks(world.device, config.train.precision)
        splitter.take()  # stops the clock
        trace = out / ("trace.json.gz" if world.size == 1 else f"trace-rank{world.rank}.json.gz")
        traced = min(steps, TRACED_STEPS)
        kernels = trace_steps(lambda: train_step(next(ready), 0), traced, world.device, trace, peaks)

        profile = {
            "environment": describe_environment(world.device),
            "settings": _settings(config, world, train_step),
            "dataset": dataset,
            "steps": steps,
            "ceilings": _of_typical_rank(world.gather(ceilings)),
            "collectives": collectives,
            "run": _run_figures(config, split),
            "ranks": gather_ranks(world, split, ceilings["loader"]["pairs_per_second"]),
            "peaks": peaks,
            "kernels": kernels,
            "utilisation": sampler.summary(),
        }
        profile["verdict"] = judge(profile)._asdict()  # 7
        if world.is_main:
            write_profile(profile, out)
            write_page(profile, out)
        return profile


class _Teller:
    """Tells of progress; it is called between two steps, so seldom does much."""

    def __init__(self, on_progress: OnProgress | None, stop: StopRequest) -> None:
        self._on_progress, self._stop = on_progress, stop
        self._part, self._told = "", 0.0

    def __call__(self, part: str, done: int = 0, steps: int | None = None) -> None:
        """Raises `TrainingError` where the process has been asked to stop."""
        now = time.monotonic()
        if part == self._part and now - self._told < PROGRESS_SECONDS:
            return
        self._part, self._told = part, now
        if self._stop.signal:
            raise TrainingError("The profile was stopped by a signal; nothing has been written.")
        if self._on_progress is not None:
            self._on_progress(Progress(part, done, steps))


def _ready_batches(config: RunConfig, world: World) -> Iterator[Batch]:
    """Without end, and at no cost."""
    data = config.data.model_copy(update={"loader": "synthetic"})
    with closing(rank_loader(config.model_copy(update={"data": data}), world)) as loader:
        return cycle(list(islice(loader.epoch(0), SYNTHETIC_BATCHES)))


def _step_ceiling(
    splitter: StepSplitter,
    train_step: TrainStep,
    ready: Iterator[Batch],
    steps: int,
    batch: int,
    tell: _Teller,
) -> tuple[Split, dict[str, Any]]:
    cpu = 0.0
    for done in splitter.run(train_step, ready, steps):
        tell("the step alone", done, steps)
        cpu = cpu_seconds() if not done else cpu
    cpu = cpu_seconds() - cpu
    split = splitter.split()
    return split, {
        "pairs_per_second": batch / split.step_seconds,
        "cores_used": cpu / sum(split.seconds),
        "phases": split.phases,
        "host_lead_seconds": split.host_lead_seconds,
    }


def _of_typical_rank(of_ranks: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each part the figures of the rank in the middle: half of the ranks are as slow or slower."""
    found = {}
    for part in of_ranks[0]:
        by_rate = sorted((ceilings[part] for ceilings in of_ranks), key=lambda c: c["pairs_per_second"])
        found[part] = by_rate[(len(by_rate) - 1) // 2]
    return found


def _run_figures(config: RunConfig, split: Split) -> dict[str, Any]:
    return {
        "pairs_per_second": config.train.batch_size / split.step_seconds,
        "step_seconds": split.step_seconds,
        "step_seconds_percentiles": split.percentiles,
        "phases": split.phases,
    }


def _settings(config: RunConfig, world: World, train_step: TrainStep) -> dict[str, Any]:
    """Those that the speed depends on."""
    data, model, train = config.data, config.model, config.train
    host = socket.gethostname()
    return {
        "backbone": model.backbone,
        "projector": model.projector,
        "image_size": data.image_size,
        "batch_size": train.batch_size,
        "micro_batches": train.micro_batches,
        "precision": train.precision,
        "norm": model.norm,
        "sync_bn": model.sync_bn,
        "compile": train.compile,
        "cuda_graph": train.cuda_graph,
        "loader": data.loader,
        "data_path": str(data.path),
        "workers": data.workers,
        "prefetch": data.prefetch,
        "augment": data.augment.implementation,
        "loss": model.loss.algorithm,
        "loss_algorithm": _loss_algorithm(config, world, train_step),
        "device": world.device.type,
        "has_bf16": _has_bf16(world.device),
        "ranks": world.size,
        "ranks_per_host": world.gather(host).count(host),
        "cores": len(os.sched_getaffinity(0)),
    }


def _loss_algorithm(config: RunConfig, world: World, train_step: TrainStep) -> str:
    loss, z_a_ND = config.model.loss, train_step.z_a_ND
    if loss.temperature is not None:
        return "dense"
    if loss.algorithm != "auto":
        return loss.algorithm
    n, D = z_a_ND.shape
    return choose_algorithm(n * world.size, D, world.size, z_a_ND.dtype, z_a_ND.device)


def _has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
