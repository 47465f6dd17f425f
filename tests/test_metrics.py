"""Reports reach every log: numbers that are known, under the same names; W&B where it is asked for."""

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools.console import describe_step
from train.errors import TrainingError
from train.metrics import MetricsWriter, StepReport, read_metrics

PLAIN = StepReport(30, 200, 1, 12.345, 10.0, 460.0, 0.1, 0.01, 321.6, 0.25, 0, 60.0, 3725.4)
FULL = replace(
    PLAIN,
    pairs_per_second_per_gpu=160.8,
    phase_ms={"forward": 20.0, "loss": 3.25},
    exposed_communication_ms=1.5,
    mfu=0.414,
    memory_gib=31.25,
    gradient_scale=65536.0,
    probe_accuracy=0.1234,
    knn_accuracy=0.301,
)


class FakeWandb(ModuleType):
    """Takes note of what it is told."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None) -> None:
        super().__init__("wandb")
        self.refusal, self.started, self.logged, self.finished = refusal, [], [], 0

    def init(self, **options: object) -> "FakeWandb":
        if self.refusal is not None:
            raise self.Error(self.refusal)
        self.started.append(options)
        return self

    def log(self, record: dict, step: int) -> None:
        self.logged.append((step, record))

    def finish(self) -> None:
        self.finished += 1


def test_every_log_has_the_known_numbers_under_the_same_names(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path, 0)) as writer:
        for report in (PLAIN, replace(FULL, step=31)):
            writer.write(report)
    plain, full = read_metrics(tmp_path)
    assert plain == PLAIN.record() and None not in plain.values()
    added = {"pairs_per_second_per_gpu", "forward_ms", "loss_ms", "exposed_communication_ms", "mfu"}
    added |= {"memory_gib", "gradient_scale", "probe_accuracy", "knn_accuracy"}
    assert full.keys() - plain.keys() == added
    assert (full["loss_ms"], full["knn_accuracy"]) == (3.25, 0.301)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == full.keys() - {"step", "total_steps", "seconds_left"}
    assert [(e.step, e.value) for e in board.Scalars("mfu")] == [(31, pytest.approx(0.414))]
    assert [e.step for e in board.Scalars("loss")] == [30, 31]


def test_console_line_shows_what_is_known() -> None:
    assert describe_step(FULL) == (
        "step 30/200  loss 12.35 (invariance 10, redundancy 460)  lr 0.1  322 pairs/s (161 per GPU)  "
        "data wait 25%  loss 3.25 ms  exposed 1.5 ms  MFU 41%  31.2 GiB  scale 65536  probe 12.3%  "
        "kNN 30.1%  1:02:05 left"
    )
    assert "per GPU" not in describe_step(replace(PLAIN, pairs_per_second_per_gpu=321.6))


def test_wandb_receives_the_reports_and_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start, report in ((0, PLAIN), (30, replace(FULL, step=31))):
        with closing(MetricsWriter(tmp_path, start, wandb="birds", settings={"seed": 3})) as writer:
            writer.write(report)
    assert fake.logged == [(30, PLAIN.record()), (31, replace(FULL, step=31).record())]
    assert fake.finished == 2
    first, second = fake.started
    assert first == second and first["project"] == "birds" and first["config"] == {"seed": 3}
    assert first["id"] and first["resume"] == "allow"
    MetricsWriter(tmp_path, 31).close()
    assert len(fake.started) == 2  # not without a project


def test_wandb_that_ends_before_the_run_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandb()

    def fail(*_: object, **__: object) -> None:
        raise fake.Error("the service has ended\nmore")

    fake.log = fail
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with closing(MetricsWriter(tmp_path, 0, wandb="birds")) as writer:
        for step in (30, 31):
            writer.write(replace(PLAIN, step=step))
    assert caplog.messages == [
        "W&B takes no more reports (the service has ended); training goes on without it."
    ]
    assert [record["step"] for record in read_metrics(tmp_path)] == [30, 31] and not fake.finished
    del fake.log
    fake.finish = fail
    MetricsWriter(tmp_path, 31, wandb="birds").close()
    assert len(caplog.messages) == 2


def test_wandb_that_is_missing_or_refuses_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fake, message in (
        (None, r"train\.wandb needs the Python package 'wandb'; install it, or set train\.wandb to null\.$"),
        (FakeWandb("no API key\nmore"), r"W&B refuses the run \(no API key\); log in with `wandb login`"),
    ):
        monkeypatch.setitem(sys.modules, "wandb", fake)
        with pytest.raises(TrainingError, match=message):
            MetricsWriter(tmp_path, 0, wandb="birds")
