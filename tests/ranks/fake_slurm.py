#!/usr/bin/env python3
"""SLURM on one machine for one job, as `sbatch`, `srun`, `scontrol` and `squeue` on PATH.

The folder $FAKE_SLURM holds calls.txt (one command line each), options.json (sbatch's, from the script),
tasks.txt (process groups of the running tasks), state.txt, and codes.txt (of each run of the batch script).
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

JOB = "4321"
folder = Path(os.environ["FAKE_SLURM"])
name, arguments = Path(sys.argv[0]).name, sys.argv[1:]


def sbatch(script: str) -> None:
    lines = Path(script).read_text().splitlines()
    flags = [shlex.split(line)[1] for line in lines if line.startswith("#SBATCH ")]
    options = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    (folder / "options.json").write_text(json.dumps(options))
    (folder / "script.sh").write_text("\n".join(lines))
    (folder / "state.txt").write_text("RUNNING")
    devnull = subprocess.DEVNULL  # or who asked would wait for the end of the job
    subprocess.Popen(
        [sys.argv[0], "--run"], start_new_session=True, stdin=devnull, stdout=devnull, stderr=devnull
    )
    print(f"Submitted batch job {JOB}")


def run() -> None:
    """The batch script, and again as often as it is requeued."""
    options = json.loads((folder / "options.json").read_text())
    log = Path(options["output"].replace("%j", JOB))
    while True:
        with log.open("a") as output:
            code = subprocess.call(
                ["bash", str(folder / "script.sh")],
                env={**os.environ, "SLURM_JOB_ID": JOB},
                cwd=options["chdir"],
                stdout=output,
                stderr=output,
            )
        with (folder / "codes.txt").open("a") as codes:
            print(code, file=codes)
        if not (folder / "requeued").exists():
            break
        (folder / "requeued").unlink()
    (folder / "state.txt").write_text("COMPLETED")


def srun(*arguments: str) -> int:
    options = json.loads((folder / "options.json").read_text())
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    own, command = {}, list(arguments)
    while command[0].startswith("--"):
        flag, equals, value = command.pop(0).partition("=")
        own[flag] = value if equals else command.pop(0) if flag == "--output" else ""
    assert own["--open-mode"] == "append" and own["--cpus-per-task"] == options["cpus-per-task"]
    tasks = []
    for rank in range(nodes * per_node):
        environment = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % per_node),
            "SLURM_STEP_NUM_TASKS": str(nodes * per_node),
            "SLURM_STEP_NUM_NODES": str(nodes),
            "SLURM_STEP_NODELIST": "localhost",
        }
        with Path(own["--output"].replace("%j", JOB).replace("%t", str(rank))).open("a") as log:
            tasks.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    (folder / "tasks.txt").write_text("\n".join(str(task.pid) for task in tasks))
    return max(task.wait() for task in tasks)


def scontrol(command: str, job: str) -> None:
    assert (command, job) == ("requeue", JOB)
    (folder / "requeued").touch()


def squeue(*arguments: str) -> None:
    state = (folder / "state.txt").read_text()
    assert f"--jobs={JOB}" in arguments
    if state != "COMPLETED":
        print(f"{JOB} {state}" if "--format=%i %T" in arguments else state)


if arguments == ["--run"]:
    run()
else:
    with (folder / "calls.txt").open("a") as calls:
        print(name, *arguments, file=calls)
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "squeue": squeue}[name](*arguments))
