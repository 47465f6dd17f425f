"""A network that costs next to nothing and parts that sleep, for profiles whose bottleneck is known."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from torch import Tensor, nn

from pipelines import sample_reader
from tools.profile import ceilings, run
from train.config import RunConfig
from train.distributed import process_group

STEPS = 3
SLOW_SECONDS = 0.2  # far longer than all that a step does


class TinyTwin(nn.Module):
    """Embeds the mean colours of the views, in a given time."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.layer, self.seconds = nn.Linear(3, 8), seconds

    def forward(self, views_VNCHW: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self.seconds)
        z_a_ND, z_b_ND = self.layer(views_VNCHW.mean((3, 4))).unbind()
        return z_a_ND, z_b_ND

    def synchronise_norms(self) -> None:
        """It has none."""


def delayed(function: Callable, seconds: float) -> Callable:
    """The same, but so much later."""

    def call(*arguments: object) -> object:
        time.sleep(seconds)
        return function(*arguments)

    return call


def profile_tiny(
    config: RunConfig, out: Path, seconds_of_step: float = 0.0, on_progress: run.OnProgress | None = None
) -> dict:
    """Profile with a `TinyTwin` for the network."""
    with (
        patch.object(run, "build_twin", lambda config, device: TinyTwin(seconds_of_step)),
        patch.object(ceilings, "STAGE_SECONDS", 0.02),
    ):
        return run.profile_run(config, STEPS, out, on_progress)


def profile_slow_rank(config: RunConfig, folder: Path, on_progress: run.OnProgress | None) -> None:
    """What a rank does: two profiles, `folder`/compute and `folder`/loader; rank 1 is slow in these."""
    pause = SLOW_SECONDS if os.environ["RANK"] == "1" else 0.0
    of_image = pause / (config.train.batch_size // 2)
    with (
        process_group("cpu") as world,  # a launcher's store serves for one, which both profiles share
        patch.object(run, "process_group", lambda device: nullcontext(world)),
        patch.object(run, "stage_ceilings", lambda config, world: ({}, None)),
    ):
        profile_tiny(config, folder / "compute", pause, on_progress)
        with patch.object(sample_reader, "read_image", delayed(sample_reader.read_image, of_image)):
            profile_tiny(config, folder / "loader", 0.0, on_progress)
