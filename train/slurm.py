"""Runs on a SLURM cluster: submit one, take a task's place among the ranks, queue the job again.

`submit` hands the cluster a plain command through submitit's batch script; nothing is pickled, and none of
submitit's own code runs in the job, so that its handlers cannot answer signals in the trainer's place.
"""

import difflib
import logging
import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from pipelines.order import steps_per_epoch
from train.config import RunConfig, save_config
from train.errors import ConfigError, TrainingError
from train.files import preparing

log = logging.getLogger(__name__)

JOBS_NAME = "slurm"  # folder in the run directory: batch scripts, configs and logs of its jobs
END_SECONDS = 120  # how long the other ranks of a job may go on after one has ended

_NUMBER, _WORD = r"[1-9]\d*", r"\S+"
_TIME = r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}"
# What a job can be asked for: the form of the value, and its meaning. Most are options of sbatch as they are.
JOB_KEYS = {
    "nodes": (_NUMBER, "machines, such as nodes=4"),
    "gpus": (rf"([\w.-]+:)?{_NUMBER}", "GPUs per machine, such as gpus=8 or gpus=h100:8"),
    "cpus": (_NUMBER, "CPU cores per GPU, such as cpus=10"),
    "time": (_TIME, "the limit of one stretch, in minutes, H:MM:SS or D-HH:MM:SS, such as time=24:00:00"),
    "signal": (_NUMBER, "seconds before that limit at which the run saves and is queued again"),
    "mem": (r"\d+[KMGT]?", "memory per machine, such as mem=200G"),
    "partition": (_WORD, "partition"),
    "account": (_WORD, "account"),
    "qos": (_WORD, "quality of service"),
    "constraint": (_WORD, "features of the machines, such as constraint=a100"),
    "reservation": (_WORD, "reservation"),
    "exclude": (_WORD, "machines to avoid, such as exclude=node[3,7]"),
    "name": (_WORD, "name of the job"),
}


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    job_id: str
    ranks: int
    log: Path  # of rank 0; {rank} takes the place of 0 in the others' names
    script: Path  # the batch script that was submitted


def parse_job(text: str) -> dict[str, str]:
    """The keys and values of `nodes=4,gpus=8,time=24:00:00`. Raises `ConfigError` in one sentence."""
    job: dict[str, str] = {}
    # Commas also stand inside values such as exclude=a,b: only one before the next key separates.
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ConfigError(f"--slurm {text!r} must be KEY=VALUE,...; the keys are {', '.join(JOB_KEYS)}.")
        if key not in JOB_KEYS:
            near = difflib.get_close_matches(key, JOB_KEYS, n=1)
            hint = f"the nearest known key is {near[0]!r}" if near else f"the keys are {', '.join(JOB_KEYS)}"
            raise ConfigError(f"--slurm has an unknown key {key!r}; {hint}.")
        if key in job:
            raise ConfigError(f"--slurm has the key {key!r} twice.")
        form, meaning = JOB_KEYS[key]
        if not re.fullmatch(form, value):
            raise ConfigError(f"--slurm: {key}={value} does not fit: {key} is {meaning}.")
        job[key] = value
    return job


def submit(config: RunConfig, job: Mapping[str, str], command: Sequence[str]) -> Submitted:
    """Queue `command FILE` as a SLURM job with one task per GPU; FILE holds all settings of `config`.

    `job` is what `parse_job` gives. Relative paths keep the meaning that they have here. Where the time limit
    comes near, and where SLURM preempts the job, the ranks are to save and rank 0 is to call `requeue`.

    Raises `TrainingError` where submitit or SLURM is missing, a job of this run is in the queue already or
    the cluster refuses this one; `DataError` for a batch that cannot be split over the ranks.
    """
    nodes, gpus = int(job.get("nodes", 1)), job.get("gpus", "1")
    gpus_per_node = int(gpus.rpartition(":")[2])
    ranks = nodes * gpus_per_node
    steps_per_epoch(config.train.batch_size, config.train.batch_size, ranks)  # refuses an uneven split
    _warn_of_absent_data(config)
    executor = _executor(config.run_dir / JOBS_NAME)
    _refuse_second_job(config.run_dir)
    cpus = int(job.get("cpus", config.data.workers + 1))
    own_keys = ("constraint", "mem", "reservation", "exclude", "partition", "account", "qos", "time")
    executor.update_parameters(
        job_name=job.get("name", config.run_dir.resolve().name),
        nodes=nodes,
        gpus_per_node=gpus,
        ntasks_per_node=gpus_per_node,
        cpus_per_task=cpus,
        time=None,  # submitit's own default would be 5 minutes, the partition's is meant
        wckey=None,
        stderr_to_stdout=True,
        additional_parameters={
            **{key: job[key] for key in own_keys if key in job},
            "signal": f"USR1@{job.get('signal', '120')}",
            "requeue": True,
            "chdir": str(Path.cwd()),
        },
        # Since SLURM 22.05 steps do not inherit the job's cores per task; nor do they append to logs.
        srun_args=[f"--cpus-per-task={cpus}", "--open-mode=append", f"--wait={END_SECONDS}"],
    )
    settings = config.run_dir.resolve() / JOBS_NAME / f"config-{secrets.token_hex(4)}.yaml"
    return _submit(executor, config, [*command, str(settings)], settings, ranks)


def join_step() -> None:
    """Let a task of a SLURM step with several tasks find its place in torchrun's environment variables.

    Does nothing under torchrun, in a batch script itself, or outside of SLURM.
    """
    os.environ.update(step_environment(os.environ))


def step_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...) that follow from SLURM's."""
    tasks = int(slurm.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "RANK" in slurm:
        return {}
    # Below the ports that systems give away; jobs that share a machine have different numbers.
    port = 15000 + int(slurm["SLURM_JOB_ID"]) % 10000
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // int(slurm["SLURM_STEP_NUM_NODES"])),
        "MASTER_ADDR": _first_host(slurm["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port),
    }


def requeue(job_id: str) -> bool:
    """Put this running job back into the queue; False, with a warning, where SLURM does not do it.

    A job that its owner has cancelled receives SIGTERM just like one that is preempted; it stays cancelled.
    """
    try:
        if _ask("squeue", "--noheader", "--format=%T", f"--jobs={job_id}") != "RUNNING":
            return False
        _ask("scontrol", "requeue", job_id)
    except _NO_ANSWER as error:
        log.warning(
            "SLURM does not queue job %s again (%s); submit it again to go on from the checkpoint.",
            job_id,
            _last_line(error),
        )
        return False
    return True


_NO_ANSWER = OSError, subprocess.SubprocessError


def _ask(*command: str) -> str:
    """What a command of SLURM prints. Raises `OSError` and `SubprocessError`."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def _last_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[-1].removesuffix(".")


def _first_host(nodes: str) -> str:
    """The first name in SLURM's short form of a list: gpu07 of gpu[07-09,12],login1."""
    first = re.match(r"([^,\[]|\[[^\]]*\])+", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _warn_of_absent_data(config: RunConfig) -> None:
    path = config.data.path
    if config.data.loader != "synthetic" and ":" not in str(path) and not path.exists():
        log.warning("data.path %s is not there on this machine; the job's machines must have it.", path)


def _executor(folder: Path) -> "submitit.SlurmExecutor":  # noqa: F821
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"--slurm needs the Python package '{error.name}'; install it: pip install 'fastbarlow[slurm]'."
        ) from error
    try:
        return submitit.SlurmExecutor(folder.resolve())
    except RuntimeError as error:
        raise TrainingError(
            "--slurm finds no srun on this machine; submit from a machine of the cluster."
        ) from error


def _refuse_second_job(run_dir: Path) -> None:
    """Two jobs at once would overwrite each other's checkpoints."""
    earlier = [path.name.partition("_")[0] for path in (run_dir / JOBS_NAME).glob("*_submission.sh")]
    if not earlier:
        return
    try:
        alive = _ask("squeue", "--noheader", "--format=%i %T", "--jobs=" + ",".join(earlier)).splitlines()
    except _NO_ANSWER:  # so it answers, too, where the cluster has forgotten all of them
        return
    if alive:
        job_id, state = alive[0].split()
        raise TrainingError(
            f"Job {job_id} of the run in {run_dir} is in the queue already ({state}); cancel it with "
            f"scancel {job_id}, or choose another run_dir."
        )


def _submit(
    executor: "submitit.SlurmExecutor",  # noqa: F821
    config: RunConfig,
    command: list[str],
    settings: Path,
    ranks: int,
) -> Submitted:
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    with preparing(config.run_dir):
        settings.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, settings)
    try:
        # Nothing of the shape of a job that this is called in; else the user's SBATCH_ACCOUNT and such count.
        with redirect_stderr(StringIO()), clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext():
            submitted = executor._submit_command(shlex.join(command))
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        settings.unlink()
        raise TrainingError(f"SLURM refuses the job: {_last_line(error)}.") from error
    finally:
        for leftover in settings.parent.glob(".submission_file_*.sh"):  # links or refused
            leftover.unlink()
    paths = submitted.paths
    return Submitted(submitted.job_id, ranks, paths.stdout, paths.submission_file)
