"""The ranks of a run: torchrun's environment and the process group."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from train.errors import LostRankError, TrainingError

_log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)  # generous: the first batch may wait for a compiler or a cold disk


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: object) -> list:
        """`value` of every rank, in rank order, on every rank; waits for all of them."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def maximum(self, x: Tensor) -> int:
        """The largest `x` (0-d integer on `device`) of all ranks; waits for all of them."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return int(x)


@contextmanager
def process_group(device_choice: str) -> Iterator[World]:
    """The ranks that torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK) name, or a single one.

    `device_choice` is "cpu", "cuda" or "auto". Uses NCCL between GPUs and gloo between CPU processes.
    Raises `TrainingError` where "cuda" has no GPU for this process or the ranks do not find each other, and
    `LostRankError` where a collective inside fails. After an error inside, a group of GPUs is left to the end
    of the process.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = _choose_device(device_choice, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(0, 1, device)
        return
    if rank == 0 and _restarts_may_hang():
        _log.warning(
            "Ranks that torchrun starts again may seek each other at their former addresses and hang; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment."
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device_id)
    except RuntimeError as error:
        raise TrainingError(
            f"Rank {rank} does not find the other ranks, {size} in all ({_cause(error)}); see that all run, "
            f"and name the network interface that joins the machines in {backend.upper()}_SOCKET_IFNAME."
        ) from error
    try:
        yield World(rank, size, device)
    except BaseException as error:
        if backend == "gloo":  # NCCL could wait forever for collectives that this rank will never join
            dist.destroy_process_group()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
            raise LostRankError(
                f"Rank {rank} has lost another one, whose own last words tell why ({_cause(error)}); start "
                f"again to go on from the last checkpoint."
            ) from error
        raise
    dist.destroy_process_group()


def _restarts_may_hang() -> bool:
    """With PyTorch's default, a store of addresses that outlives the ranks (pytorch issue 135712)."""
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shares_store and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def _cause(error: RuntimeError) -> str:
    """The first line, without the place in the library's source: of gloo's, 'Connection reset by peer'."""
    return str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]


def _choose_device(choice: str, local_rank: int) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise TrainingError(
            f"The device is set to {choice}, but local rank {local_rank} needs a GPU of its own and this "
            f"machine offers {gpus}; start fewer processes or compute on the CPU (device cpu)."
        )
    return torch.device("cuda", local_rank)
