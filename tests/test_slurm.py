"""What a cluster is asked for, a task's place among the ranks, and who may queue a job again."""

import json
import logging
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.errors import DataError
from tools.cli import app
from train.config import RunConfig, load_config
from train.errors import ConfigError, TrainingError
from train.slurm import JOB_KEYS, parse_job, requeue, step_environment, submit

ALL_KEYS = ", ".join(JOB_KEYS)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    data = {"path": tmp_path / "images", "workers": 3}
    return RunConfig.model_validate(
        {"run_dir": tmp_path / "a run", "data": data, "train": {"batch_size": 24, "device": "cpu"}}
    )


def options(notes: Path) -> dict[str, str]:
    return json.loads((notes / "options.json").read_text())


def calls(notes: Path) -> list[str]:
    return (notes / "calls.txt").read_text().splitlines() if (notes / "calls.txt").exists() else []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", f"--slurm '' must be KEY=VALUE,...; the keys are {ALL_KEYS}."),
        ("nodes", f"--slurm 'nodes' must be KEY=VALUE,...; the keys are {ALL_KEYS}."),
        ("nodes=2,partion=a", "--slurm has an unknown key 'partion'; the nearest known key is 'partition'."),
        ("gpus=8,colour=red", f"--slurm has an unknown key 'colour'; the keys are {ALL_KEYS}."),
        ("gpus=8,gpus=4", "--slurm has the key 'gpus' twice."),
        ("nodes=0", "--slurm: nodes=0 does not fit: nodes is machines, such as nodes=4."),
        ("gpus=h100", "gpus is GPUs per machine, such as gpus=8 or gpus=h100:8."),
        ("time=1h", "such as time=24:00:00."),
        ("mem=many", "memory per machine, such as mem=200G."),
        ("partition=", "--slurm: partition= does not fit: partition is partition"),
    ],
)
def test_a_bad_request_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(text)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("time", ["90", "90:00", "24:00:00", "1-12", "1-12:30", "1-12:30:00"])
def test_slurms_own_forms_are_taken(time: str) -> None:
    job = parse_job(f"nodes=4, gpus=a100:8,time={time},exclude=n1,n[3,7],constraint=a100&ib")
    assert job == {
        "nodes": "4",
        "gpus": "a100:8",
        "time": time,
        "exclude": "n1,n[3,7]",
        "constraint": "a100&ib",
    }


def test_the_job_is_a_plain_command_that_is_told_of_its_end_and_may_be_requeued(
    config: RunConfig, fake_slurm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    job = parse_job("nodes=3,gpus=h100:4,time=1-0,partition=big,account=us,qos=high,mem=200G,signal=300")
    submitted = submit(config, job, ["/bin/echo", "pretrain"])
    folder = config.run_dir / "slurm"
    assert (submitted.job_id, submitted.ranks) == ("4321", 12)
    assert (submitted.log, submitted.script) == (folder / "4321_0_log.out", folder / "4321_submission.sh")
    assert options(fake_slurm) == {
        "nodes": "3",
        "gpus-per-node": "h100:4",
        "ntasks-per-node": "4",
        "cpus-per-task": "4",
        "time": "1-0",
        "partition": "big",
        "account": "us",
        "qos": "high",
        "mem": "200G",
        "signal": "USR1@300",
        "requeue": "",
        "open-mode": "append",
        "chdir": str(tmp_path),
        "job-name": "a run",
        "output": f"{folder}/%j_0_log.out",
    }
    (settings,) = folder.glob("config-*.yaml")
    assert load_config(settings) == config
    command = submitted.script.read_text().splitlines()[-1]
    assert command.startswith("srun ") and command.endswith(f" /bin/echo pretrain '{settings}'")
    assert not list(folder.glob("*.pkl")) and not list(folder.glob(".*"))


def test_what_is_not_asked_for_is_the_clusters_choice(config: RunConfig, fake_slurm: Path) -> None:
    submit(config, {}, ["true"])
    asked = options(fake_slurm)
    assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == ("1", "1", "1")
    assert asked["signal"] == "USR1@120"
    assert not asked.keys() & {"time", "wckey", "partition", "account", "qos", "mem", "comment"}


def test_submission_is_refused_in_a_sentence(
    config: RunConfig, fake_slurm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusal(kind: type[Exception], job: dict[str, str]) -> str:
        with pytest.raises(kind) as caught:
            submit(config, job, ["true"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot be split evenly over 35 processes" in refusal(DataError, {"nodes": "5", "gpus": "7"})
    assert calls(fake_slurm) == []

    (fake_slurm.parent / "bin" / "sbatch").unlink()
    (fake_slurm.parent / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: No such QOS.' >&2; exit 1"
    )
    (fake_slurm.parent / "bin" / "sbatch").chmod(0o755)
    assert refusal(TrainingError, {}) == "SLURM refuses the job: sbatch: error: No such QOS."
    assert list((config.run_dir / "slurm").iterdir()) == []
    assert f"data.path {config.data.path} is not there" in caplog.text

    (config.run_dir / "slurm" / "4321_submission.sh").touch()
    (fake_slurm / "state.txt").write_text("PENDING")
    assert f"Job 4321 of the run in {config.run_dir} is in the queue already (PENDING)" in refusal(
        TrainingError, {}
    )
    (fake_slurm / "state.txt").write_text("COMPLETED")
    assert "SLURM refuses" in refusal(TrainingError, {})

    monkeypatch.setenv("PATH", "/usr/nowhere")
    assert "finds no srun on this machine" in refusal(TrainingError, {})
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install 'fastbarlow[slurm]'" in refusal(TrainingError, {})


def test_overrides_are_submitted_and_procs_refused(
    fake_slurm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("run_dir: runs/r\ndata: {path: images}\n")
    monkeypatch.setattr(sys, "executable", "/bin/true")
    command = ["pretrain", "r.yaml", "train.batch_size=16", "--slurm", "gpus=2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "Submitted job 4321 with 2 ranks" in result.stdout and "scancel 4321" in result.stdout
    (settings,) = Path("runs/r/slurm").glob("config-*.yaml")
    saved = load_config(settings)
    assert (saved.train.batch_size, saved.run_dir) == (16, Path("runs/r"))  # where the job runs, too
    assert CliRunner().invoke(app, [*command, "--procs", "2"]).exit_code == 2
    assert CliRunner().invoke(app, [*command, "train.batch_sise=16"]).exit_code == 2
    assert len([call for call in calls(fake_slurm) if call.startswith("sbatch")]) == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("login1,gpu[07-09]", "login1"),
        ("rack[2-3]node[010-012]-ib,x", "rack2node010-ib"),
    ],
)
def test_a_task_finds_its_place(nodes: str, first: str) -> None:
    slurm = {
        "SLURM_JOB_ID": "123456",
        "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": nodes,
    }
    place = step_environment(slurm)
    assert place == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": first,
        "MASTER_PORT": "18456",
    }
    assert step_environment(slurm | {"RANK": "0"}) == {}  # torchrun in a step
    assert step_environment(slurm | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert step_environment({"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) == {}


def test_a_running_job_is_requeued_and_a_cancelled_one_is_not(
    fake_slurm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (fake_slurm / "state.txt").write_text("RUNNING")
    assert requeue("4321")
    assert calls(fake_slurm)[-1] == "scontrol requeue 4321"
    (fake_slurm / "state.txt").write_text("COMPLETING")
    assert not requeue("4321")
    assert len(calls(fake_slurm)) == 3
    assert not caplog.messages
    (fake_slurm / "state.txt").write_text("RUNNING")
    (fake_slurm.parent / "bin" / "scontrol").unlink()
    monkeypatch.setenv("PATH", f"{fake_slurm.parent / 'bin'}:/usr/bin/nowhere:{Path(sys.executable).parent}")
    with caplog.at_level(logging.WARNING):
        assert not requeue("4321")
    (sentence,) = caplog.messages
    assert sentence.startswith("SLURM does not queue job 4321 again (") and "\n" not in sentence
