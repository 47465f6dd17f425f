"""Reports follow their steps once the values have arrived, in order, and all of them before a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train.loop
from model.config import ModelConfig
from model.loss import BarlowLoss
from pipelines.batch import Batch
from train.checkpoint import load_checkpoint
from train.config import RunConfig
from train.errors import TrainingError
from train.flop import model_flop, peak_flops
from train.loop import pretrain
from train.meter import Meter
from train.metrics import StepReport, read_metrics
from train.phases import PhaseClock
from train.probe import OnlineProbe
from train.readback import Readback, Stamp
from train.step import TrainStep

CPU = torch.device("cpu")
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
    train_config = config.train.model_copy(update={"max_skipped_steps": 0})
    with pytest.raises(TrainingError, match=f"gradient is not finite any more at step {EVERY + 1} "):
        pretrain(config.model_copy(update={"train": train_config}), reports.append)
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
    assert later.has_arrived() and 0.02 < later.stamp.seconds_since(earlier.stamp) < 20


class FakeStep:
    """What a meter asks a step for."""

    network = torch.nn.Identity()
    z_a_ND = torch.tensor([[3.0, 0.0, 1e-4, 5.0, -1.0], [1.0, 0.0, 0.0, 5.0, 3.0]])
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    class optimizer:  # noqa: N801
        param_groups = ({"lr": 0.5}, {"lr": 0.25})


def measured(meter: Meter, *steps: int, phases: tuple = ()) -> None:
    """Reports asked for after these steps."""
    loss = BarlowLoss(*torch.tensor([3.0, 1.25, 5.0]))
    for done in steps:
        meter.measure(done, 2, loss, bad_samples=7, skipped_steps=4, phases=phases)


def test_speed_counts_the_steps_since_the_last_report() -> None:
    meter = Meter(6, 20, 10, FakeStep, CPU)
    start = meter.since
    measured(meter, 11, 14)
    for moment, stamp in ((100.0, start), *zip((102.0, 105.0), stamps(meter), strict=True)):
        stamp._moment = moment
    first, second = meter.reports(wait=False)
    assert (first.pairs_per_second, first.seconds_left) == (3, 18)
    assert (second.pairs_per_second, second.seconds_left) == (6, 6)
    assert (second.loss, second.invariance, second.redundancy) == (3, 1.25, 5)
    assert (second.bad_samples, second.skipped_steps) == (7, 4)


def stamps(meter: Meter) -> list[Stamp]:
    return [measurement.values.stamp for measurement in meter.pending]


def test_time_after_a_restart_is_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("train.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(6, 20, 10, FakeStep, CPU)
    measured(meter, 11)
    for _ in range(50):
        next(clock)
    meter.add_knn_accuracy(0.5)
    meter.restart()
    measured(meter, 12)
    first, second = meter.reports(wait=False)
    assert first.pairs_per_second > 0.1 and second.pairs_per_second > 0.1  # 10 s a call of the clock, not 500
    assert (first.knn_accuracy, second.knn_accuracy) == (0.5, None)


def test_report_holds_what_can_be_known_and_nothing_else() -> None:
    """On the CPU, in fp32, without labels: no figure of a GPU, of a scaler, or of an evaluation."""
    meter = Meter(6, 20, 10, FakeStep, CPU)
    measured(meter, 11)
    (report,) = meter.reports(wait=True)
    names = {"step", "total_steps", "epoch", "loss", "invariance", "redundancy", "lr_weights", "lr_biases"}
    names |= {
        "pairs_per_second",
        "data_wait_share",
        "bad_samples",
        "skipped_steps",
        "seconds",
        "seconds_left",
    }
    names |= {"diagonal_error", "off_diagonal", "embedding_std", "dead_features"}
    assert report.record().keys() == names

    class ScaledStep(FakeStep):
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)

    ScaledStep.scaler.scale(torch.ones(1))
    probe = OnlineProbe(3, 2, 1.0, CPU)
    probe.right.fill_(9)
    meter = Meter(6, 20, 10, ScaledStep, CPU, probe=probe, flop_per_pair=5e3, peak_flops=1e5)
    clock = PhaseClock(CPU)
    clock.mark("never asked for")
    clock.start()
    for phase in ("forward", "loss"):
        clock.mark(phase)
    measured(meter, 13, phases=tuple(clock.take()))
    (report,) = meter.reports(wait=True)
    added = {"forward_ms", "loss_ms", "gradient_scale", "probe_accuracy", "mfu"}
    assert report.record().keys() == names | added
    assert all(report.record()[name] >= 0 for name in added)
    assert (report.gradient_scale, report.probe_accuracy) == (512, 9 / 18)
    assert report.mfu == pytest.approx(report.pairs_per_second * 5e3 / 1e5)
    assert probe.right == 0  # counted anew until the next report
    assert not clock.take()


def test_report_tells_how_the_embeddings_and_their_correlations_spread() -> None:
    meter = Meter(6, 20, 10, FakeStep, CPU)
    measured(meter, 11)
    (report,) = meter.reports(wait=True)
    assert report.embedding_std == pytest.approx((1 + 5e-5 + 2) / 5)
    assert report.dead_features == pytest.approx(3 / 5)  # one varies, but by less than the loss's epsilon
    assert report.diagonal_error == pytest.approx(0.5)  # of 5 elements
    assert report.off_diagonal == pytest.approx(0.5)  # of 20
    meter = Meter(6, 20, 10, FakeStep, CPU, has_correlations=False)
    measured(meter, 11)
    (report,) = meter.reports(wait=True)
    assert report.diagonal_error is None and report.off_diagonal is None


def test_largest_loss_is_that_of_the_steps_since_the_last_report() -> None:
    meter = Meter(6, 20, 10, FakeStep, CPU)
    found = []
    for done, losses in ((11, [5.0]), (15, [3.0, float("nan"), 9.0, 2.0]), (16, [1.0]), (17, [float("nan")])):
        for loss in losses:
            meter.note(BarlowLoss(*torch.tensor([loss, 1, 2])))
        measured(meter, done)
        (report,) = meter.reports(wait=True)
        found.append(report.record().get("largest_loss"))
    assert found == [5, 9, 1, None]  # a record has nothing that is not finite


def test_operations_of_a_network_are_counted_back_and_forth() -> None:
    """Of a pair: two views, each with a forward pass and about twice as much backward."""
    config = ModelConfig(backbone="resnet50", projector="8192-8192-8192")
    backbone, projector = 4.09e9, 2048 * 8192 + 2 * 8192**2  # multiply-adds; the former as torchvision states
    assert model_flop(config, 2, 224) / 2 == pytest.approx(2 * 3 * 2 * (backbone + projector), rel=0.02)


def test_peaks_of_gpus_by_name_and_precision() -> None:
    assert peak_flops("NVIDIA H200", "bf16") == peak_flops("NVIDIA H100 80GB HBM3", "fp16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("Tesla V100-SXM2-16GB", "fp16") == 125e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("Tesla V100S-PCIE-32GB", "fp16") == 130e12
    assert peak_flops("NVIDIA A10", "bf16") == 125e12 != peak_flops("NVIDIA A100 80GB PCIe", "bf16")
    unknown = (
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "fp16"),
        ("Quadro", "fp16"),
        ("Tesla V100-SXM2-16GB", "bf16"),
    )
    assert [peak_flops(*gpu) for gpu in unknown] == [None] * 3
