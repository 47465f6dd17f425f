"""Reports follow their steps once the values have arrived, in order, and all of them before a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train.loop
from model.loss import BarlowLoss
from pipelines.batch import Batch
from train.checkpoint import load_checkpoint
from train.config import RunConfig
from train.errors import TrainingError
from train.loop import pretrain
from train.meter import Meter, Readback
from train.metrics import StepReport, read_metrics
from train.step import TrainStep

EVERY = 3  # steps between checkpoints


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    train = {"batch_size": 4, "precision": "fp32", "device": "cpu", "log_every": 1, "max_steps": 5}
    train["checkpoint"] = {"every_steps": EVERY}
    return RunConfig.model_validate(
        {
            "run_dir": tmp_path / "run",
            "data": {"path": "none", "loader": "synthetic", "image_size": 32},
            "model": {"backbone": "resnet18", "projector": "8-8"},
            "train": train,
        }
    )


def steps_seen(monkeypatch: pytest.MonkeyPatch, before_step: Callable[[TrainStep, int], None]) -> None:
    class WatchedStep(TrainStep):
        def __call__(self, batch: Batch, step: int) -> BarlowLoss:
            before_step(self, step)
            return super().__call__(batch, step)

    monkeypatch.setattr(train.loop, "TrainStep", WatchedStep)


@pytest.mark.parametrize("arrives", [True, False])
def test_a_report_waits_for_its_values_and_the_run_does_not(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """Where no value arrives of itself, as on a device far behind, reports come before a checkpoint."""
    monkeypatch.setattr(Readback, "has_arrived", lambda self: arrives)
    events: list[str] = []
    steps_seen(monkeypatch, lambda _, step: events.append(f"step {step}"))
    reports: list[StepReport] = []
    result = pretrain(config, lambda report: (reports.append(report), events.append(f"report {report.step}")))
    if arrives:
        expected = [f"{what} {n + first}" for n in range(5) for what, first in (("step", 0), ("report", 1))]
    else:
        expected = [f"step {n}" for n in range(3)] + [f"report {n}" for n in (1, 2, 3)]
        expected += ["step 3", "step 4", "report 4", "report 5"]
    assert events == expected
    assert result.last_report == reports[-1]
    assert [record["loss"] for record in read_metrics(config.run_dir)] == [r.loss for r in reports]
    assert all(r.pairs_per_second > 0 and 0 <= r.data_wait_share <= 1 for r in reports)
    assert [r.lr_weights for r in reports] == sorted({r.lr_weights for r in reports})  # warm-up: each its own


def test_failed_loss_that_arrives_late_still_stops_the_run_before_a_checkpoint(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(train_step: TrainStep, step: int) -> None:
        if step == EVERY:
            torch.nn.init.constant_(next(train_step.network.parameters()), float("nan"))

    monkeypatch.setattr(Readback, "has_arrived", lambda self: False)
    steps_seen(monkeypatch, poison)
    reports: list[StepReport] = []
    with pytest.raises(TrainingError, match=f"loss is not finite any more at step {EVERY + 1} "):
        pretrain(config, reports.append)
    assert [report.step for report in reports] == list(range(1, EVERY + 1))
    assert load_checkpoint(config.run_dir / "checkpoint.pt")["step"] == EVERY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_are_read_from_a_gpu_without_waiting() -> None:
    earlier = Readback(torch.zeros(1, device="cuda"))
    x = torch.full((3,), 2.0, device="cuda")
    Readback(x)  # the pinned memory comes from the system only once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        later = Readback(x)
        x.zero_()  # queued behind the copy
        assert not later.has_arrived()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert later.read() == [2, 2, 2]
    assert later.has_arrived() and 0.02 < later.seconds_since(earlier) < 20


def test_speed_counts_the_steps_since_the_last_report() -> None:
    class FakeStep:
        class optimizer:  # noqa: N801
            param_groups = ({"lr": 0.5}, {"lr": 0.25})

    meter = Meter(batch_size=6, total_steps=20, start=10, device=torch.device("cpu"))
    loss = BarlowLoss(*torch.tensor([3.0, 1.0, 2.0]))
    for done, failed in ((11, 0), (14, 13)):
        meter.measure(done, 2, loss, torch.tensor(failed), FakeStep, bad_samples=7)
    meter.reported._stamp, meter.pending[0].values._stamp, meter.pending[1].values._stamp = (
        100.0,
        102.0,
        105.0,
    )
    (first, none), (second, failed) = meter.reports(wait=False)
    assert (none, failed) == (0, 13)
    assert (first.pairs_per_second, first.seconds_left) == (3, 18)
    assert (second.pairs_per_second, second.seconds_left) == (6, 6)
    assert (second.loss, second.invariance, second.redundancy, second.bad_samples) == (3, 1, 2, 7)
