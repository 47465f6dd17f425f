"""A run learns, resumes exactly, does not depend on the number of ranks, and fails in one sentence."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train.loop
from pipelines.batch import Batch
from pipelines.errors import DataError
from train.checkpoint import load_checkpoint
from train.config import RunConfig, load_config, save_config
from train.errors import TrainingError
from train.launch import launch
from train.loop import build_twin, pretrain
from train.metrics import StepReport, read_metrics
from train.step import TrainStep

NUM_IMAGES, BATCH_SIZE = 26, 8
STEPS_PER_EPOCH = 3  # 2 images are left over


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small JPEG files in two classes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(5)
    for n in range(NUM_IMAGES):
        target = folder / f"class{n % 2}" / f"{n:02}.jpg"
        target.parent.mkdir(exist_ok=True)
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(target)
    return folder


@pytest.fixture
def config(images: Path, tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": tmp_path / "run",
            "seed": 11,
            "data": {"path": images, "loader": "folder", "image_size": 32, "workers": 0},
            "model": {"backbone": "resnet18", "projector": "32-32-32"},
            "train": {
                "epochs": 4,
                "batch_size": BATCH_SIZE,
                "precision": "fp32",
                "device": "cpu",
                "log_every": 2,
                "optim": {"lr_weights": 3.0, "lr_biases": 0.1, "warmup_epochs": 1},
            },
        }
    )


def with_(config: RunConfig, **changes: object) -> RunConfig:
    """The config with `section__key=value` changes."""
    settings = config.model_dump()
    for key, value in changes.items():
        *sections, name = key.split("__")
        target = settings
        for section in sections:
            target = target[section]
        target[name] = value
    return RunConfig.model_validate(settings)


def failure(config: RunConfig, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        pretrain(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def poison_weights(monkeypatch: pytest.MonkeyPatch, before_step: int) -> None:
    class PoisonedStep(TrainStep):
        def __call__(self, batch: Batch, step: int):
            if step == before_step:
                torch.nn.init.constant_(next(self.network.parameters()), float("nan"))
            return super().__call__(batch, step)

    monkeypatch.setattr(train.loop, "TrainStep", PoisonedStep)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_falls_and_the_run_directory_tells_it(config: RunConfig, precision: str) -> None:
    reports: list[StepReport] = []
    config = with_(config, train__precision=precision, train__epochs=8)
    result = pretrain(config, on_step=reports.append)
    total = 8 * STEPS_PER_EPOCH
    assert (result.step, result.steps_done, result.last_report) == (total, total, reports[-1])
    assert [r.step for r in reports] == [1, *range(2, total + 1, 2)]
    assert reports[-1].loss < 0.8 * reports[0].loss
    assert all(0 <= r.data_wait_share <= 1 and r.pairs_per_second > 0 for r in reports)
    weight = config.model.loss.off_diagonal_weight
    assert reports[0].loss == pytest.approx(reports[0].invariance + weight * reports[0].redundancy, rel=1e-5)
    assert [r["loss"] for r in read_metrics(config.run_dir)] == [r.loss for r in reports]
    assert load_config(config.run_dir / "config.yaml") == config
    assert list((config.run_dir / "tensorboard").iterdir())
    assert load_checkpoint(result.checkpoint)["step"] == total


def test_half_precision_scales_the_gradients_and_resumes_the_scale(config: RunConfig) -> None:
    config = with_(config, train__precision="fp16", train__max_steps=2)
    scaler = load_checkpoint(pretrain(config).checkpoint)["scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] >= 0
    result = pretrain(with_(config, train__max_steps=3))
    scaler_after = load_checkpoint(result.checkpoint)["scaler"]
    assert result.steps_done == 1
    has_overflowed = scaler_after["scale"] == scaler["scale"] / 2
    assert has_overflowed or scaler_after["_growth_tracker"] == scaler["_growth_tracker"] + 1


def test_killed_run_continues_with_the_same_samples(config: RunConfig, tmp_path: Path) -> None:
    """Killed in mid-epoch between two checkpoints, a run ends with the weights of a whole one."""
    recipes = []
    for name in ("whole", "killed"):
        run = with_(config, run_dir=tmp_path / name, train__checkpoint__every_steps=4)
        recipes.append(tmp_path / f"{name}.yaml")
        save_config(run, recipes[-1])

    def train_recorded(kill_before: int, *recipes: Path) -> int:
        script = Path(__file__).parent / "ranks" / "recorded_run.py"
        environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
        command = [sys.executable, str(script), str(kill_before), *map(str, recipes)]
        return subprocess.run(command, env=environment, timeout=200).returncode

    assert train_recorded(5, *recipes) == -signal.SIGKILL
    assert train_recorded(-1, recipes[1]) == 0

    whole, killed = ((tmp_path / r.stem / "samples.txt").read_text().splitlines() for r in recipes)
    assert len(set(whole)) == 4 * STEPS_PER_EPOCH
    # The step after the checkpoint at 4 steps was done, lost with the process, and done again.
    assert killed == [*whole[:5], *whole[4:]]
    steps = [record["step"] for record in read_metrics(tmp_path / "killed")]
    assert steps == sorted(set(steps))
    weights = [load_checkpoint(tmp_path / r.stem / "checkpoint.pt")["model"] for r in recipes]
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key


def test_two_processes_go_on_like_one(config: RunConfig, tmp_path: Path) -> None:
    """A run that goes on as two processes in mid-epoch has the same global batches, statistics and gradients.

    Only the order of summation differs.
    Distances are shares of the way that the weights (or biases, or running statistics) went in the run.
    Measured: up to 1.5e-5, just as much as between one thread and two of a single process.
    """
    config = with_(config, train__log_every=1, train__max_steps=5, train__optim__warmup_epochs=0.1)
    one: list[StepReport] = []
    two: list[StepReport] = []
    run = with_(config, run_dir=tmp_path / "one")
    weights_one = load_checkpoint(pretrain(run, on_step=one.append).checkpoint)["model"]
    run = with_(config, run_dir=tmp_path / "two")
    pretrain(with_(run, train__max_steps=2), on_step=two.append)
    weights_two = load_checkpoint(launch(run, 2, on_step=two.append).checkpoint)["model"]
    assert [r.loss for r in two] == pytest.approx([r.loss for r in one], rel=1e-4)

    twin = build_twin(config, torch.device("cpu"))
    start, parameters = twin.state_dict(), {name for name, _ in twin.named_parameters()}
    kinds = {
        "weights": {name for name in parameters if start[name].ndim > 1},
        "biases": {name for name in parameters if start[name].ndim == 1},
        "statistics": {name for name in start.keys() - parameters if start[name].is_floating_point()},
    }
    for kind, names in kinds.items():
        way = torch.cat([(weights_one[name] - start[name]).flatten() for name in sorted(names)])
        distance = torch.cat([(weights_one[name] - weights_two[name]).flatten() for name in sorted(names)])
        assert distance.norm() < 1e-4 * way.norm(), kind


def test_finished_run_started_again_says_so(config: RunConfig) -> None:
    config = with_(config, train__max_steps=2)
    first = pretrain(config)
    again = pretrain(config)
    assert (first.step, first.steps_done) == (2, 2)
    assert (again.step, again.steps_done, again.last_report) == (2, 0, None)
    assert pretrain(with_(config, train__max_steps=3)).steps_done == 1
    assert pretrain(with_(config, train__checkpoint__resume=False)).steps_done == 2


def test_non_finite_loss_stops_before_the_checkpoint_is_spoilt(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_weights(monkeypatch, before_step=4)
    message = failure(with_(config, train__log_every=100, train__checkpoint__every_steps=2), TrainingError)
    assert "loss is not finite any more at step 5 (epoch 1)" in message
    assert "checkpoint.pt of step 4" in message
    assert load_checkpoint(config.run_dir / "checkpoint.pt")["step"] == 4


def test_non_finite_weights_are_not_saved(config: RunConfig) -> None:
    """The first loss is finite, but the step after it is not."""
    absurd = with_(config, train__optim__lr_weights=1e38, train__optim__warmup_epochs=0, train__max_steps=1)
    message = failure(absurd, TrainingError)
    assert "state of the network is not finite any more at step 1" in message
    assert "no checkpoint has been written yet" in message
    assert not (config.run_dir / "checkpoint.pt").exists()


def test_checkpoint_that_does_not_fit_is_refused(config: RunConfig) -> None:
    config = with_(config, train__max_steps=1)
    checkpoint = pretrain(config).checkpoint
    message = failure(with_(config, model__backbone="resnet34"), TrainingError)
    assert "model.backbone=resnet18" in message and "resnet34" in message and str(checkpoint) in message
    assert "seed=11" in failure(with_(config, seed=12), TrainingError)
    assert "train.batch_size=8" in failure(with_(config, train__batch_size=4), TrainingError)
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    assert "damaged" in failure(config, TrainingError)


def test_bad_input_is_told_before_training(config: RunConfig, tmp_path: Path) -> None:
    assert f"dataset of {NUM_IMAGES}" in failure(with_(config, train__batch_size=64), DataError)
    assert str(tmp_path / "none") in failure(with_(config, data__path=tmp_path / "none"), DataError)
    (tmp_path / "file").write_text("in the way")
    assert "run_dir" in failure(with_(config, run_dir=tmp_path / "file" / "run"), TrainingError)


def test_error_of_a_process_is_the_error_of_the_launch(config: RunConfig) -> None:
    with pytest.raises(DataError, match="cannot be split evenly over 2 processes"):
        launch(with_(config, train__batch_size=7), 2)


def test_killed_process_ends_the_launch(config: RunConfig) -> None:
    def kill_rank_1(report: StepReport) -> None:
        for child in multiprocessing.active_children():
            if child.name == "rank 1":
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(TrainingError, match="process of rank 1 was killed by signal 9"):
        launch(with_(config, train__epochs=1000), 2, on_step=kill_rank_1)
    assert not multiprocessing.active_children()
