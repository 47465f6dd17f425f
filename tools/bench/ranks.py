"""A measurement on several ranks of this machine."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tools.processes import run_processes
from train.distributed import World, process_group
from train.launch import meeting_point


def run_ranks(job: Callable[[World], Any], num_processes: int, device: str) -> list[Any]:
    """What `job`, a picklable function, returns on each of that many fresh processes, in rank order.

    The ranks share the threads of this process. `device` is "cpu" or "cuda". Raises `DataError` where a rank
    fails, and leaves no process behind.
    """
    threads = max(1, torch.get_num_threads() // num_processes)
    with meeting_point(num_processes) as environments:
        jobs = [partial(_run, job, environment, threads, device) for environment in environments]
        return run_processes(jobs, poll=lambda: None)


def _run(job: Callable[[World], Any], environment: dict[str, str], threads: int, device: str) -> Any:
    os.environ.update(environment)
    torch.set_num_threads(threads)
    with process_group(device) as world:
        return job(world)
