"""torchrun, `--procs` and SLURM: a run that is stopped, or loses a rank, ends with a whole run's weights.

Bit for bit: all have two ranks with one thread each. The recipe's loader has worker processes, which receive
every signal, too.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tools.cli import app
from train.checkpoint import load_checkpoint
from train.config import load_config
from train.loop import pretrain
from train.metrics import read_metrics

STEPS, EVERY, PER_EPOCH = 18, 4, 3
KILL_BEFORE = 5  # the last checkpoint is then of step 4
RANKS = Path(__file__).parent / "ranks"
CLI = [sys.executable, "-P", "-m", "tools.cli", "pretrain"]
CLI_MODULE = ["-m", "tools.cli", "pretrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = pytest.mark.timeout(500)  # a dozen torch processes, on a machine that may be busy


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("launchers")
    write_images(root / "images", ["ant", "bee"], 4 * PER_EPOCH)
    return root


@pytest.fixture(scope="module")
def recipe(root: Path) -> Callable[[str], Path]:
    """The recipe of the run in that folder."""

    def write(name: str) -> Path:
        config = {
            "run_dir": str(root / name),
            "seed": 11,
            "data": {"path": str(root / "images"), "loader": "folder", "image_size": 16, "workers": 1},
            "model": {"backbone": "resnet18", "projector": "32-32"},
            "train": {
                "epochs": STEPS // PER_EPOCH,
                "batch_size": 8,
                "precision": "fp32",
                "device": "cpu",
                "log_every": 1,
                "optim": {"lr_weights": 3.0, "lr_biases": 0.1, "warmup_epochs": 1},
                "checkpoint": {"every_steps": EVERY},
            },
            "eval": {"online": {"probe": False, "knn_every_epochs": 0}},
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return root / f"{name}.yaml"

    return write


@pytest.fixture
def environment(fake_slurm: Path) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RANKS.parents[1])}
    return {**os.environ, **ours, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as `process_group` asks for


def last_step(run_dir: Path) -> int:
    records = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return records[-1]["step"] if records else 0


def wait_for_step(run_dir: Path, after: int) -> None:
    """Until the run has gone on from step `after`."""
    while last_step(run_dir) <= after:
        time.sleep(0.02)


@contextmanager
def started(command: list[object], environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process that leaves nothing behind."""
    process = subprocess.Popen([str(part) for part in command], env=environment)
    try:
        yield process
    finally:
        process.terminate()  # the ranks of a killed torchrun would live on
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_killed_and_stopped_run_ends_like_a_whole_one(
    root: Path,
    recipe: Callable[[str], Path],
    environment: dict[str, str],
    fake_slurm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. two torchrun agents, as on two machines: a rank is killed, later one agent gets SIGTERM
    2. SIGUSR1 to `--procs`  3. SLURM's time limit, requeue, end

    The whole run goes on meanwhile.
    """
    path, run_dir = recipe("disturbed"), root / "disturbed"
    checkpoint = run_dir / "checkpoint.pt"
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", RANKS / "recorded_run.py", -1]
    with started([*command, recipe("whole")], environment) as whole:
        stop_two_machines(path, run_dir, environment)  # 1
        step = load_checkpoint(checkpoint)["step"]
        assert KILL_BEFORE < step == last_step(run_dir) < STEPS
        assert (run_dir / "written.txt").read_text() == str(run_dir / "samples.txt")  # by the last rank
        lines = (run_dir / "samples.txt").read_text().splitlines()
        steps = [int(line.split()[0]) for line in lines]
        assert steps == [*range(KILL_BEFORE), *range(EVERY, step)]  # one step was lost, and done twice

        with started([*CLI, path, "--procs", 2], environment) as run:  # 2
            wait_for_step(run_dir, step)
            run.send_signal(signal.SIGUSR1)
            assert run.wait() == 75
        assert step < load_checkpoint(checkpoint)["step"] == last_step(run_dir) < STEPS
        step = last_step(run_dir)

        for name, value in environment.items():  # 3
            monkeypatch.setenv(name, value)
        asked = ["pretrain", str(path), "--slurm", "nodes=2,gpus=1,time=60", "--json"]
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.output
        wait_for_step(run_dir, step)
        for group in (fake_slurm / "tasks.txt").read_text().split():
            os.killpg(int(group), signal.SIGUSR1)
        while (fake_slurm / "state.txt").read_text() != "COMPLETED":
            time.sleep(0.05)
        assert (fake_slurm / "codes.txt").read_text().split() == ["75", "0"]
        assert (fake_slurm / "calls.txt").read_text().count("scontrol requeue 4321") == 1
        assert whole.wait() == 0

    ours, theirs = (
        load_checkpoint(root / name / "checkpoint.pt")["model"] for name in ("disturbed", "whole")
    )
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, STEPS + 1))
    samples = (root / "whole" / "samples.txt").read_text().splitlines()
    assert len(samples) == STEPS and set(lines) <= set(samples)

    one = load_config(recipe("one"), ["train.max_steps=5"])
    pretrain(one)
    losses = [[record["loss"] for record in read_metrics(folder)[:5]] for folder in (one.run_dir, run_dir)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def stop_two_machines(path: Path, run_dir: Path, environment: dict[str, str]) -> None:
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--monitor-interval=0.1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    command += [RANKS / "recorded_run.py", KILL_BEFORE, path]
    with started(command, environment) as one, started(command, environment) as two:
        wait_for_step(run_dir, KILL_BEFORE)
        one.send_signal(signal.SIGTERM)
        assert one.wait() != 0 and two.wait() != 0
