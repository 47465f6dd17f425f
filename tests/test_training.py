"""A run learns, survives a kill, and fails in one sentence."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import train.loop
from pipelines.batch import Batch
from pipelines.errors import DataError
from pipelines.loaders import build_loader
from train.checkpoint import load_checkpoint
from train.config import RunConfig, load_config, save_config
from train.errors import TrainingError
from train.launch import launch
from train.loop import build_twin, configure_backends, pretrain
from train.metrics import MetricsWriter, StepReport, read_metrics
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
    """With few distortions and nearly all images in a batch, or else the loss is mostly noise."""
    reports: list[StepReport] = []
    view = {"crop_scale": (0.6, 1), "jitter_p": 0, "grayscale_p": 0, "blur_p": 0, "solarize_p": 0}
    total = 20
    config = with_(
        config,
        train__precision=precision,
        train__epochs=total,
        train__batch_size=NUM_IMAGES - 2,
        data__augment={"view_a": view, "view_b": view},
    )
    result = pretrain(config, on_step=reports.append)
    assert (result.step, result.steps_done, result.last_report) == (total, total, reports[-1])
    assert [r.step for r in reports] == [1, *range(2, total + 1, 2)]
    assert np.mean([report.loss for report in reports[-4:]]) < 0.75 * reports[0].loss
    assert all(0 <= r.data_wait_share <= 1 and r.pairs_per_second > 0 for r in reports)
    weight = config.model.loss.off_diagonal_weight
    assert reports[0].loss == pytest.approx(reports[0].invariance + weight * reports[0].redundancy, rel=1e-5)
    assert [r["loss"] for r in read_metrics(config.run_dir)] == [r.loss for r in reports]
    assert load_config(config.run_dir / "config.yaml") == config
    assert list((config.run_dir / "tensorboard").iterdir())
    assert load_checkpoint(result.checkpoint)["step"] == total


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


def test_reference_world_size_divides_the_gradient(config: RunConfig) -> None:
    with closing(build_loader(config.data, seed=0, batch_size=BATCH_SIZE)) as loader:
        batch = next(iter(loader.epoch(0, 0)))

    def gradients(reference_world_size: int) -> dict[str, torch.Tensor]:
        run = with_(config, model__loss__reference_world_size=reference_world_size)
        twin = build_twin(run, torch.device("cpu"))
        TrainStep(run, twin, STEPS_PER_EPOCH)(batch, 0)
        return {name: parameter.grad for name, parameter in twin.named_parameters()}

    one, sixteen = gradients(1), gradients(16)
    assert any(gradient.any() for gradient in one.values())
    for name, gradient in one.items():
        assert torch.equal(gradient, 16 * sixteen[name]), name


def test_fp32_is_not_rounded_to_tf32(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, is_rounded in (("fp32", False), ("bf16", True)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not is_rounded)
        configure_backends(with_(config, train__precision=precision))
        assert torch.backends.cudnn.allow_tf32 is is_rounded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_on_a_gpu_never_waits_for_it(config: RunConfig, precision: str) -> None:
    config = with_(config, train__precision=precision, data__loader="synthetic")
    with closing(build_loader(config.data, seed=0, batch_size=BATCH_SIZE, device="cuda")) as loader:
        batches = list(islice(loader.epoch(0, 0), 3))
    train_step = TrainStep(config, build_twin(config, torch.device("cuda")), STEPS_PER_EPOCH)
    train_step(batches[0], 0)  # compilers and libraries set themselves up
    train_step(batches[1], 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = train_step(batches[2], 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.total.isfinite()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_metrics_of_a_full_disk_are_told_and_damaged_lines_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boards: list[object] = []
    close = SummaryWriter.close
    monkeypatch.setattr(SummaryWriter, "close", lambda board: (boards.append(board), close(board)))
    report = StepReport(1, 9, 0, *[0.5] * 10)
    writer = MetricsWriter(tmp_path, 0)
    writer.write(report)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))  # the system's refusal of a longer file
    try:
        with pytest.raises(TrainingError) as caught:
            writer.write(replace(report, step=2))
        with pytest.raises(TrainingError, match="Cannot write the metrics"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"Cannot write the metrics to {tmp_path}: File too large; make room and start again, "
        f"and the run goes on from the last checkpoint."
    )
    assert len(boards) == 1
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    assert lines.startswith(b'{"step": 1') and not lines.endswith(b"\n")  # cut short by the refusal
    (tmp_path / "metrics.jsonl").write_bytes(lines + b'\n\xff\0\n7\n{"step": 3}\n{"step": 4')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
    MetricsWriter(tmp_path, 3).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]


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


def test_bad_image_ends_the_launch_with_its_name(config: RunConfig, images: Path, tmp_path: Path) -> None:
    """One rank meets it, and the other must not wait for that one."""
    folder = shutil.copytree(images, tmp_path / "images")
    bad = folder / "class1" / "13.jpg"
    bad.write_bytes(bad.read_bytes()[:-200])
    # The steps of an epoch leave 2 images out: within a few epochs the bad one comes.
    with pytest.raises(DataError, match=r"13\.jpg"):
        launch(with_(config, data__path=folder, data__on_bad_sample="stop", train__epochs=20), 2)
    assert not multiprocessing.active_children()


def test_bf16_gives_two_processes_the_loss_of_one(config: RunConfig, tmp_path: Path) -> None:
    """Measured: the same loss until the weights change, 0.1 % apart after the first change."""
    config = with_(config, train__precision="bf16", train__log_every=1, train__max_steps=3)
    one: list[StepReport] = []
    two: list[StepReport] = []
    pretrain(with_(config, run_dir=tmp_path / "one"), on_step=one.append)
    launch(with_(config, run_dir=tmp_path / "two"), 2, on_step=two.append)
    assert [r.loss for r in two] == pytest.approx([r.loss for r in one], rel=1e-2)


def test_killed_process_ends_the_launch(config: RunConfig) -> None:
    def kill_rank_1(report: StepReport) -> None:
        for child in multiprocessing.active_children():
            if child.name == "rank 1":
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(TrainingError, match="process of rank 1 was killed by signal 9"):
        launch(with_(config, train__epochs=1000), 2, on_step=kill_rank_1)
    assert not multiprocessing.active_children()
