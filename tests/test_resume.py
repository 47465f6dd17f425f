"""A run that is stopped after any step and resumed is the run that never stopped, bit for bit.

On one thread of the CPU. No random state needs to be saved for that, because training draws from none.
"""

import random
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train.loop
from pipelines.batch import Batch
from tests.ranks.exact import ThinResNet
from train.checkpoint import load_checkpoint
from train.config import RunConfig
from train.loop import build_twin, pretrain
from train.step import TrainStep

STEPS = 5  # of 10 of the 24 images: over three epochs


@pytest.fixture(autouse=True)
def tiny_network_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("model.backbones.ResNet", ThinResNet)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def steps_done(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Grows by each step's number, samples, crops and learning rates."""
    done: list[tuple] = []

    class RecordedStep(TrainStep):
        def __call__(self, batch: Batch, step: int):
            loss = super().__call__(batch, step)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            crops = batch.params.box_VN4.flatten().tolist()
            done.append((step, batch.indices_N.tolist(), crops, rates))
            return loss

    monkeypatch.setattr(train.loop, "TrainStep", RecordedStep)
    return done


def configure(run_dir: Path, images: Path, max_steps: int = STEPS, **settings: dict[str, Any]) -> RunConfig:
    sections = {
        "data": {"path": images, "loader": "ffcv", "image_size": 17, "workers": 0},
        # Divided by 16, the gradients fit float16 after a few trials of the scaler.
        "model": {"backbone": "resnet18", "projector": "12-10", "loss": {"reference_world_size": 16}},
        "train": {
            "epochs": 3,
            "max_steps": max_steps,
            "batch_size": 10,
            "precision": "fp32",
            "device": "cpu",
            "optim": {"lr_weights": 100, "lr_biases": 0.3, "warmup_epochs": 1},
        },
        "eval": {"online": {"knn_every_epochs": 0}},
    }
    for name, changes in settings.items():
        sections[name] = {**sections[name], **changes}
    return RunConfig.model_validate({"run_dir": run_dir, "seed": 5, **sections})


def assert_same(state: dict[str, Any], other: dict[str, Any]) -> None:
    """All of two checkpoints but the settings, which tell where the run was to stop."""
    state, other = ({name: part for name, part in s.items() if name != "config"} for s in (state, other))
    torch.testing.assert_close(state, other, rtol=0, atol=0)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_run_stopped_after_any_step_ends_as_if_it_had_not_been(
    precision: str, micro_batches: int, beton: Path, tmp_path: Path, steps_done: list[tuple]
) -> None:
    """In weights, momenta, running statistics, gradient scale, probe, samples, crops and learning rates."""
    train = {"precision": precision, "micro_batches": micro_batches}

    def run(name: str, until: int = STEPS) -> dict[str, Any]:
        return load_checkpoint(pretrain(configure(tmp_path / name, beton, until, train=train)).checkpoint)

    whole, steps_of_whole = run("whole"), steps_done.copy()
    assert [step for step, *_ in steps_of_whole] == list(range(STEPS))
    momenta = [of_one["mu"] for of_one in whole["optimizer"]["state"].values()]
    assert all(mu.abs().max() > 0 for mu in momenta) and whole["probe"]["weight"].abs().max() > 0
    if precision == "fp16":  # it has met gradients that overflowed, and others
        assert 1 < whole["scaler"]["scale"] < 2**16 and whole["scaler"]["_growth_tracker"] > 0
    for stop in range(1, STEPS):
        steps_done.clear()
        stopped = run(f"stopped-{stop}", stop)
        assert stopped["step"] == len(steps_done) == stop
        assert_same(run(f"stopped-{stop}"), whole)
        assert steps_done == steps_of_whole
        shutil.rmtree(tmp_path / f"stopped-{stop}")


def random_states() -> tuple[bytes, str, object]:
    """Of the generators that code draws from if it does not bring its own."""
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), random.getstate()


@pytest.fixture
def states_at_the_start(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Grows by the random states of each run after the weights, which are drawn from the seed."""
    states: list[tuple] = []

    def recorded(config: RunConfig, device: torch.device) -> torch.nn.Module:
        twin = build_twin(config, device)
        states.append(random_states())
        return twin

    monkeypatch.setattr(train.loop, "build_twin", recorded)
    return states


@pytest.mark.parametrize(
    ("loader", "workers"), [("folder", 0), ("folder", 1), ("ffcv", 1), ("dali", 1), ("synthetic", 1)]
)
def test_training_draws_from_no_global_random_state(
    loader: str, workers: int, beton: Path, tmp_path: Path, states_at_the_start: list[tuple]
) -> None:
    data = {"path": beton, "loader": loader, "image_size": 20, "workers": workers}
    online = {"features": {"image_size": 20, "resize": 20}, "online": {"knn_every_epochs": 1}}
    config = configure(tmp_path / "run", beton, max_steps=4, data=data, eval=online)
    pretrain(config)
    pretrain(configure(tmp_path / "run", beton, max_steps=5, data=data, eval=online))
    assert len(states_at_the_start) == 2
    assert states_at_the_start[0] == states_at_the_start[1] == random_states()


@pytest.mark.parametrize("draw", [torch.rand, np.random.rand, lambda count: random.random()])
def test_a_draw_in_the_step_would_be_seen(
    draw: Any, beton: Path, tmp_path: Path, states_at_the_start: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:

    def draw_in(step: object, phase: str) -> AbstractContextManager[None]:
        draw(1)
        return nullcontext()

    monkeypatch.setattr(train.loop.TrainStep, "_phase", draw_in)
    pretrain(configure(tmp_path / "run", beton, max_steps=1))
    assert states_at_the_start[0] != random_states()
