"""A run learns, survives a kill, and fails in one sentence."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.loop
from pipelines.batch import Batch
from pipelines.errors import DataError
from pipelines.loaders import build_loader
from train.checkpoint import load_checkpoint, save_checkpoint
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


def test_metrics_lost_to_a_full_disk_are_told_and_do_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    report = StepReport(1, 9, 0, *[0.5] * 10)
    with closing(MetricsWriter(tmp_path, 0)) as writer:
        writer.write(report)
        length = (tmp_path / "metrics.jsonl").stat().st_size
        with longest_file(length + 30):
            for step in (2, 3, 4):
                writer.write(replace(report, step=step))
        for step in (5, 6):
            writer.write(replace(report, step=step))
    assert caplog.messages == [
        f"Cannot write the metrics to {tmp_path}: File too large; training goes on without them until there "
        f"is room."
    ]
    assert "Traceback" not in capfd.readouterr().err
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 5, 6]
    steps = {event.step for event in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")}
    assert steps >= {5, 6}


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Within the block the system refuses to make a file longer than that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_at_the_start_leaves_the_run_directory_as_it_was(config: RunConfig) -> None:
    """A recipe cut short could be a valid one of other settings, and half a name a run of its own."""
    config.run_dir.mkdir()
    save_config(config, config.run_dir / "config.yaml")
    (config.run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    before = {path.name: path.read_bytes() for path in config.run_dir.iterdir()}
    with longest_file(10):
        assert "run_dir" in failure(config, TrainingError)
    assert {path.name: path.read_bytes() for path in config.run_dir.iterdir()} == before


def test_damaged_lines_of_metrics_are_skipped(tmp_path: Path) -> None:
    lines = b'{"step": 1}\n{"step": 2, "lo\n\xff\0\n7\n{"step": 3}\n{"step": 4'
    (tmp_path / "metrics.jsonl").write_bytes(lines)
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


class PoisonedStep(TrainStep):
    """Steps whose numbers are in `poisoned` see one sample that makes loss and statistics infinite or NaN."""

    poisoned: ClassVar[set[int]] = set()

    def __call__(self, batch: Batch, step: int):
        weight = next(self.network.parameters())
        good = weight.detach().clone()
        if step in self.poisoned:
            weight.data[0, 0, 0, 0] = float("nan")
        loss = super().__call__(batch, step)
        if step in self.poisoned:
            weight.data.copy_(good)
        return loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_non_finite_step_changes_nothing_and_is_told(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    """Weights, momenta, running statistics and probe; the run goes on with the next batch."""
    config = with_(config, train__precision=precision, train__log_every=1, train__max_steps=4)
    reports: list[StepReport] = []
    states = {}
    for name, poisoned in (("sound", set()), ("poisoned", {4})):
        monkeypatch.setattr(PoisonedStep, "poisoned", poisoned)
        monkeypatch.setattr(train.loop, "TrainStep", PoisonedStep)
        run = with_(config, run_dir=config.run_dir / name)
        states[name, 4] = load_checkpoint(pretrain(run).checkpoint)
        states[name, 5] = load_checkpoint(
            pretrain(with_(run, train__max_steps=5), on_step=reports.append).checkpoint
        )
    before, after = states["poisoned", 4], states["poisoned", 5]
    for state, other in ((before, after), (states["sound", 4], before)):
        torch.testing.assert_close(floats(state), floats(other), rtol=0, atol=0)
    assert any((floats(before)[key] != value).any() for key, value in floats(states["sound", 5]).items())
    assert (reports[-1].skipped_steps, reports[0].skipped_steps) == (1, 0)
    assert "loss" not in reports[-1].record() and "loss" in reports[0].record()
    assert caplog.messages.count("Step 5 was skipped: its loss or gradient is not finite.") == 1


def floats(state: dict) -> dict[str, torch.Tensor]:
    """What training changes, less the counters of batches, which count those of skipped steps too."""
    momenta = {str(number): of["mu"] for number, of in state["optimizer"]["state"].items()}
    everything = {**state["model"], **momenta, **state["probe"]}
    return {key: value for key, value in everything.items() if value.is_floating_point()}


@pytest.mark.parametrize("allowed", [0, 2])
def test_run_stops_after_too_many_skipped_steps(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """In a row: two that were skipped before, and one that was not, count no more."""
    monkeypatch.setattr(PoisonedStep, "poisoned", {0, 1, 3, *range(5, 12)} if allowed else {5})
    monkeypatch.setattr(train.loop, "TrainStep", PoisonedStep)
    config = with_(config, train__log_every=100, train__checkpoint__every_steps=2)
    message = failure(with_(config, train__max_skipped_steps=allowed), TrainingError)
    assert f"loss or its gradient is not finite any more at step {6 + allowed} (epoch " in message
    saved = 4 + allowed
    assert f"checkpoint.pt of step {saved}; " in message
    assert load_checkpoint(config.run_dir / "checkpoint.pt")["step"] == saved


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
    assert "damaged" in failure(config, TrainingError)  # and there is none before it


def test_damaged_checkpoint_costs_the_steps_since_the_one_before(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_(config, train__max_steps=4, train__checkpoint__every_steps=2, train__log_every=1)
    checkpoint = pretrain(config).checkpoint  # written after steps 2, 3 and 4: an epoch has 3
    whole = load_checkpoint(checkpoint)["model"]
    content = checkpoint.read_bytes()
    checkpoint.unlink()
    checkpoint.write_bytes(content[: len(content) // 2])
    result = pretrain(config)
    assert (result.step, result.steps_done) == (4, 1)
    assert "is damaged, cut short or none at all" in caplog.text
    assert (config.run_dir / "checkpoint.damaged.pt").stat().st_size == len(content) // 2
    for key, value in load_checkpoint(checkpoint)["model"].items():
        torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-6)
    assert [record["step"] for record in read_metrics(config.run_dir)] == [1, 2, 3, 4]


def test_full_disk_does_not_end_the_training(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No room for the checkpoint at the end of an epoch: it is written a step later, when there is."""
    monkeypatch.setattr("train.checkpoint.RETRY_SECONDS", 0)
    saved: list[int] = []

    def save(state: dict, path: Path) -> None:
        with longest_file(100_000) if state["step"] == 3 and 3 not in saved else nullcontext():
            saved.append(state["step"])
            save_checkpoint(state, path)

    monkeypatch.setattr("train.checkpoint.save_checkpoint", save)
    result = pretrain(with_(config, train__max_steps=5))
    assert saved == [3, 4, 5] and result.step == 5
    assert "checkpoint.pt: File too large; make room" in caplog.text
    assert load_checkpoint(result.checkpoint)["step"] == 5
    assert not list(config.run_dir.glob("*.tmp"))


def test_checkpoint_is_written_by_the_clock(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a minute here, and an epoch three steps."""
    now = [0.0]
    saved: list[int] = []

    class SlowStep(TrainStep):
        def __call__(self, batch: Batch, step: int):
            now[0] += 60
            return super().__call__(batch, step)

    def save(state: dict, path: Path) -> None:
        saved.append(state["step"])

    monkeypatch.setattr(train.loop, "TrainStep", SlowStep)
    monkeypatch.setattr("train.checkpoint.time.monotonic", lambda: now[0])
    monkeypatch.setattr("train.checkpoint.save_checkpoint", save)
    pretrain(with_(config, train__checkpoint__every_minutes=2))
    assert saved == [2, 3, 5, 6, 8, 9, 11, 12]


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
