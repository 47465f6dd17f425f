"""Where the time of a training step goes on this machine, and what limits the speed: loader or step."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pipelines.batch import Batch, Loader
from pipelines.config import DataConfig
from pipelines.loaders import build_loader
from tools.bench.timing import MIN_WARMUP, PhaseTimer, drop, endless, seconds_for, warmup_batches
from tools.environment import describe_environment
from tools.figures import phases_png
from train.config import RunConfig
from train.distributed import process_group
from train.errors import TrainingError
from train.loop import build_twin, configure_backends
from train.step import TrainStep

SYNTHETIC_BATCHES = 4  # enough that their numbers differ, made before the clock starts


@dataclass(frozen=True)
class Profile:
    """What was measured: mean seconds of each phase of a step, and what its two halves can do alone."""

    phases: Mapping[str, float]
    loader_pairs_per_second: float
    step_pairs_per_second: float
    batch_size: int
    steps: int
    environment: Mapping[str, str]

    @property
    def step_seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def pairs_per_second(self) -> float:
        return self.batch_size / self.step_seconds

    @property
    def shares(self) -> dict[str, float]:
        """Each phase's part of the step's time; the parts add up to 1."""
        return {phase: seconds / self.step_seconds for phase, seconds in self.phases.items()}

    @property
    def limit(self) -> str:
        """The slower half: "loader" or "step"."""
        return "loader" if self.loader_pairs_per_second < self.step_pairs_per_second else "step"

    @property
    def title(self) -> str:
        return f"One step: {1000 * self.step_seconds:.1f} ms, {self.pairs_per_second:.1f} pairs/s"

    @property
    def verdict(self) -> str:
        loader, step = f"{self.loader_pairs_per_second:.1f}", f"{self.step_pairs_per_second:.1f}"
        if self.limit == "loader":
            return f"The loader limits: alone it delivers {loader} pairs/s; the step alone could take {step}."
        return f"The step limits: alone it takes {step} pairs/s; the loader alone could deliver {loader}."

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times in seconds."""
        return {
            "phases": dict(self.phases),
            "shares": self.shares,
            "step_seconds": self.step_seconds,
            "pairs_per_second": self.pairs_per_second,
            "loader_pairs_per_second": self.loader_pairs_per_second,
            "step_pairs_per_second": self.step_pairs_per_second,
            "limit": self.limit,
            "verdict": self.verdict,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "environment": dict(self.environment),
        }


def profile_run(
    config: RunConfig, steps: int, on_phase: Callable[[str], None] = lambda phase: None
) -> Profile:
    """Measure the run of `config` in this process with an untrained network; its checkpoint is not touched.

    1. the loader alone
    2. the real thing: loader and step together, each step split into phases
    3. the step alone, on synthetic batches that are ready beforehand
    Each part measures `steps` steps after a warm-up. That of 1 and 2 also takes away what the loader has
    prepared ahead, which would look faster than batches can be made. `on_phase` is called with each part's
    name. Raises `DataError`, `ModelError` or `TrainingError`.
    """
    batch_size = config.train.batch_size
    synthetic = config.data.model_copy(update={"loader": "synthetic"})
    with process_group(config.train.device) as world:
        device = world.device
        configure_backends(config)

        def open_loader(data: DataConfig) -> closing[Loader]:
            return closing(build_loader(data, seed=config.seed, batch_size=batch_size, device=device))

        with open_loader(config.data) as loader:
            on_phase("the loader alone")  # 1
            stream = endless(loader)
            warmup = warmup_batches(config.data)
            drop(stream, warmup)
            loader_seconds = seconds_for(stream, steps, device)

            on_phase("loader and step together")  # 2
            timer = PhaseTimer(device)
            twin = build_twin(config, device).train()
            train_step = TrainStep(config, twin, loader.steps_per_epoch, mark=timer.mark)
            phases = _mean_phases(train_step, stream, steps, timer, to_drop=warmup)
            stream.close()

        on_phase("the step alone")  # 3
        with open_loader(synthetic) as loader:
            ready = cycle(list(islice(loader.epoch(0), SYNTHETIC_BATCHES)))
            step_seconds = sum(_mean_phases(train_step, ready, steps, timer).values())
    return Profile(
        phases=phases,
        loader_pairs_per_second=steps * batch_size / loader_seconds,
        step_pairs_per_second=batch_size / step_seconds,
        batch_size=batch_size,
        steps=steps,
        environment=describe_environment(device),
    )


def check_writable(out: Path) -> None:
    """Raise `TrainingError` where `out` is no folder or cannot be made one; makes nothing."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise TrainingError(
            f"Cannot write the profile to {out}: {nearest} is no folder that one can write to."
        )


def write_profile(profile: Profile, out: Path) -> None:
    """Write `profile.json` and `profile.png` into `out`. Raises `TrainingError` where that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "profile.json").write_text(json.dumps(profile.as_dict(), indent=2) + "\n", encoding="utf-8")
        (out / "profile.png").write_bytes(phases_png(profile.phases, profile.title))
    except OSError as error:
        raise TrainingError(f"Cannot write the profile to {out}: {error.strerror}.") from error


def _mean_phases(
    train_step: TrainStep, batches: Iterator[Batch], steps: int, timer: PhaseTimer, to_drop: int = 0
) -> dict[str, float]:
    """Mean seconds of each phase over `steps` steps.

    1. the warm-up, during which a loader prepares batches ahead
    2. drop `to_drop` batches without a step
    3. one more step of the warm-up: then loader and step keep the pace that they have in a long run
    4. the measured steps
    """
    for step in range(MIN_WARMUP + steps):  # 1
        if step == MIN_WARMUP - 1:
            drop(batches, to_drop)  # 2, 3
        if step == MIN_WARMUP:
            timer.clear()  # 4
        timer.start()
        batch = next(batches)
        timer.mark("data wait")
        train_step(batch, step)
    return timer.mean_seconds()
