"""A scheduler's signal ends the run after the step under way, on every rank at the same; nothing is lost."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tools.cli import app
from train.checkpoint import CheckpointWriter, load_checkpoint
from train.config import RunConfig, save_config
from train.distributed import World
from train.loop import pretrain
from train.metrics import StepReport, read_metrics
from train.preemption import News, NewsExchange, stop_signals_noted

CPU = torch.device("cpu")


def make_config(run_dir: Path, **train: object) -> RunConfig:
    train = {"batch_size": 4, "precision": "fp32", "device": "cpu", "log_every": 1, "max_steps": 6, **train}
    return RunConfig.model_validate(
        {
            "run_dir": run_dir,
            "data": {"path": "none", "loader": "synthetic", "image_size": 32},
            "model": {"backbone": "resnet18", "projector": "8-8"},
            "train": {**train, "optim": {"warmup_epochs": 0}},
        }
    )


def send(number: int, after_step: int) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        if report.step == after_step:
            os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, name: str) -> None:
    """The signal comes after the second report, so while the third step is taken or soon after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = pretrain(make_config(tmp_path / "whole"))
        config = make_config(tmp_path / "stopped")
        stopped = pretrain(config, send(getattr(signal, name), after_step=2))
        assert (stopped.stopped_by, stopped.step, stopped.steps_done) == (name, 3, 3)
        assert stopped.last_report.step == 3
        assert load_checkpoint(stopped.checkpoint)["step"] == 3
        resumed = pretrain(config)
    finally:
        torch.set_num_threads(threads)
    assert (resumed.stopped_by, resumed.step, resumed.steps_done) == (None, 6, 3)
    assert [record["step"] for record in read_metrics(config.run_dir)] == [1, 2, 3, 4, 5, 6]
    states = [load_checkpoint(result.checkpoint) for result in (whole, resumed)]
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key


def test_signal_during_the_last_step_is_too_late_to_matter(tmp_path: Path) -> None:
    result = pretrain(make_config(tmp_path, max_steps=2), send(signal.SIGTERM, after_step=1))
    assert (result.step, result.stopped_by) == (2, None)


def test_command_ends_with_the_code_for_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_config(make_config(tmp_path / "run"), tmp_path / "recipe.yaml")

    def stopped_pretrain(config: RunConfig, on_step: Callable[[StepReport], None]) -> object:
        return pretrain(config, lambda report: (on_step(report), send(signal.SIGUSR1, 1)(report)))

    monkeypatch.setattr("train.loop.pretrain", stopped_pretrain)
    result = CliRunner().invoke(app, ["pretrain", str(tmp_path / "recipe.yaml"), "--json"])
    assert result.exit_code == 75
    assert "Stopped by SIGUSR1 after step 2, which is saved in" in result.stderr
    assert json.loads(result.stdout)["stopped_by"] == "SIGUSR1"
    monkeypatch.undo()
    assert CliRunner().invoke(app, ["pretrain", str(tmp_path / "recipe.yaml")]).exit_code == 0


def test_signal_to_one_rank_stops_all_at_the_same_step(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    save_config(make_config(tmp_path / "run"), tmp_path / "recipe.yaml")
    run_ranks(2, "preemption.py", tmp_path / "recipe.yaml")
    found = [json.loads((tmp_path / "run" / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found == [{"stopped_by": "SIGTERM", "step": 3}] * 2
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def test_signals_have_their_old_meaning_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(RuntimeError), stop_signals_noted() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signal == signal.SIGUSR1
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_thread_that_cannot_receive_signals_can_train_all_the_same() -> None:
    noted: list[int] = []

    def enter() -> None:
        with stop_signals_noted() as request:
            noted.append(request.signal)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert noted == [0]


def test_checkpoint_wanted_on_a_gpu_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was wanted in all the steps before the news arrived; after that these are old news."""
    saved: list[int] = []

    class LaggingExchange(NewsExchange):
        def __init__(self, world: World) -> None:
            super().__init__(world)
            self._lag = 2

    def write(writer: CheckpointWriter, state: dict, *, is_last: bool) -> bool:
        saved.append(state["step"])
        writer._due = float("inf")
        return True

    monkeypatch.setattr("train.loop.NewsExchange", LaggingExchange)
    monkeypatch.setattr(CheckpointWriter, "write", write)
    pretrain(make_config(tmp_path, max_steps=7, checkpoint={"every_minutes": 1e-9}))
    assert saved == [3, 7]


def test_news_of_a_gpu_are_read_when_it_has_passed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for, and nothing is lost."""
    exchange = NewsExchange(World(0, 1, CPU))
    monkeypatch.setattr(exchange, "_lag", 2)
    skipped = torch.zeros(())
    heard = []
    for done in range(10, 15):
        skipped.fill_(done)
        heard.append(exchange.exchange(done, 15 * (done == 11), done == 12, done - 5, skipped))
    nothing = News(0, 0, False, -1, 0)
    assert heard[:2] == [nothing, nothing]
    assert heard[2:] == [News(10, 0, False, 5, 10), News(11, 15, False, 6, 11), News(12, 0, True, 7, 12)]
    assert exchange.rest() == [News(13, 0, False, 8, 13), News(14, 0, False, 9, 14)]
    assert exchange.rest() == []
