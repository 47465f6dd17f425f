"""`fastbarlow pretrain`: train here, as one rank of many, or as a job of a SLURM cluster."""

import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tools.console import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    leave,
    say,
    show_json,
    training_progress,
)
from tools.options import ConfigPath, Json, Overrides

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.loop import RunResult


def pretrain(
    config: ConfigPath,
    overrides: Overrides = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="Local processes; default one per GPU, or 1 without a GPU.")
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,...", help="Submit as a SLURM job and return; keys and meanings below."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pretrain a twin as the recipe CONFIG says.

    Goes on from the last checkpoint in the run directory, if there is one and train.checkpoint.resume is
    true; the samples are then the same as in a run that was never stopped. Under torchrun each process
    joins the run, and --procs does not count.

    Shows the loss and its terms, pairs of views per second, the share of the time spent waiting for data, and
    the time left.

    SIGTERM or SIGUSR1, to any rank, end the run after the step under way: it is saved, and the exit code is
    75. A checkpoint that is damaged gives way to the one before it; one that cannot be written, as on a full
    disk, is tried again while training goes on.

    Writes into run_dir: config.yaml (all settings), checkpoint.pt and checkpoint.previous.pt, metrics.jsonl,
    tensorboard/.

    --slurm queues the run with one task per GPU. Its keys: nodes (1), gpus per node (1), cpus per GPU
    (data.workers + 1), time (the partition's default), signal (120: seconds before that limit at which the
    run saves and is queued again, to go on from there), mem per node, partition, account, qos, constraint,
    reservation, exclude, name (run_dir's). Scripts and logs lie in run_dir/slurm/. In a batch script of your
    own, srun fastbarlow pretrain CONFIG with one task per GPU does the same.

    Examples

        fastbarlow pretrain configs/imagenet_rn50_8xh100.yaml run_dir=runs/a data.path=train.beton
        fastbarlow pretrain configs/cifar10_rn18.yaml train.device=cpu --procs 2
        torchrun --nproc-per-node 8 --no-python fastbarlow pretrain configs/imagenet_rn50_8xh100.yaml
        fastbarlow pretrain configs/imagenet_rn50_32xv100.yaml --slurm nodes=4,gpus=8,cpus=10,time=24:00:00
    """
    from train.config import load_config
    from train.launch import default_processes, launch, show_notes
    from train.loop import pretrain as pretrain_run
    from train.slurm import join_step, requeue

    run = load_config(config, overrides or [])
    show_notes()
    if slurm is not None:
        _submit(run, slurm, procs, as_json=as_json)
        return
    join_step()
    num_processes = 1 if "RANK" in os.environ else procs or default_processes(run.train.device)
    is_main = int(os.environ.get("RANK", 0)) == 0
    try:
        with training_progress() if is_main else nullcontext() as on_step:
            result = launch(run, num_processes, on_step) if num_processes > 1 else pretrain_run(run, on_step)
    except KeyboardInterrupt:
        leave(
            f"Interrupted; the same command goes on from the last checkpoint in {run.run_dir}.",
            EXIT_INTERRUPTED,
        )
    if is_main:
        _tell(result, as_json=as_json)
    if result.stopped_by is not None:
        if is_main and "SLURM_JOB_ID" in os.environ and requeue(os.environ["SLURM_JOB_ID"]):
            say("SLURM has put the job back into its queue.", as_json=True)
        raise typer.Exit(EXIT_PREEMPTED)


def _tell(result: "RunResult", *, as_json: bool) -> None:
    if result.stopped_by is not None:
        say(
            f"Stopped by {result.stopped_by} after step {result.step}, which is saved in "
            f"{result.checkpoint}; the same command goes on from there.",
            as_json=True,
        )
    elif result.steps_done:
        say(f"{result.checkpoint}: step {result.step}, {result.steps_done} of them now.", as_json=as_json)
    else:
        say(f"{result.checkpoint} has seen all {result.step} steps already; nothing to do.", as_json=as_json)
    if as_json:
        report = result.last_report.record() if result.last_report else None
        show_json({**asdict(result), "checkpoint": str(result.checkpoint), "last_report": report})


def _submit(run: "RunConfig", slurm: str, procs: int | None, *, as_json: bool) -> None:
    from train.slurm import parse_job, submit

    if procs is not None:
        leave("--slurm starts one process per GPU; leave --procs out.", EXIT_USER_ERROR)
    # -P: a folder named tools where the job runs is not this one.
    job = submit(run, parse_job(slurm), [sys.executable, "-P", "-m", "tools.cli", "pretrain"])
    say(f"Submitted job {job.job_id} with {job.ranks} ranks; its script is {job.script}.", as_json=as_json)
    say(f"Watch it:  squeue -j {job.job_id}; tail -F {job.log}", as_json=as_json)
    say(f"Cancel it: scancel {job.job_id} (it saves first; submitted again, it goes on)", as_json=as_json)
    if as_json:
        show_json({"job_id": job.job_id, "ranks": job.ranks, "log": str(job.log), "script": str(job.script)})
