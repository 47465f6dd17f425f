"""A measurement on several ranks of this machine."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tools.processes import run_processes
from train.distributed import World, process_group


def run_ranks(job: Callable[[World], Any], num_processes: int, device: str) -> list[Any]:
    """What `job`, a picklable function, returns on each of that many fresh processes, in rank order.

    The ranks share the threads of this process. `device` is "cpu" or "cuda". Raises `DataError` where a rank
    fails, and leaves no process behind.
    """
    # Port 0: the system picks a free one, and no one else can take it before the ranks connect.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store runs here, not in rank 0
    }
    threads = max(1, torch.get_num_threads() // num_processes)
    jobs = [partial(_run, job, rank, environment, threads, device) for rank in range(num_processes)]
    return run_processes(jobs, poll=lambda: None)


def _run(
    job: Callable[[World], Any], rank: int, environment: dict[str, str], threads: int, device: str
) -> Any:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(threads)
    with process_group(device) as world:
        return job(world)
