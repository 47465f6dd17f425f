"""The machines of a plan: their GPUs, the links between them, and how long a collective takes there."""

import os
from dataclasses import dataclass, replace
from math import ceil, floor, log2
from typing import Literal

from model.gpus import GPUS, Gpu, find_gpu
from model.loss.hardware import CPU_THREAD, LOOPBACK, NETWORK, REACHED
from train.errors import ConfigError

CPU = "CPU"
Operation = Literal["all_reduce", "all_gather"]
# Seconds that NCCL itself reckons with for small messages (its src/graph/tuning.cc, protocol LL): the start
# of a ring or tree, a step inside a machine by NVLink, and one between machines, in a tree and in a ring.
_START, _INSIDE, _BETWEEN_TREE, _BETWEEN_RING = 6.7e-6, 0.6e-6, 5.0e-6, 2.7e-6
_LOCAL_SECONDS = 100e-6  # gloo between processes of one machine, where no profile tells; an assumption


@dataclass(frozen=True)
class Cluster:
    """That many GPUs, `per_machine` of them in each machine but the last."""

    gpu: Gpu
    gpus: int
    per_machine: int
    link: float  # bytes per second, each way, that a machine can exchange with others

    @property
    def machines(self) -> int:
        return ceil(self.gpus / self.per_machine)

    @property
    def is_cpu(self) -> bool:
        return self.gpu.name == CPU

    @property
    def slowest_link(self) -> float:
        """Bytes per second of the link at which a ring over all ranks goes: published, not reached."""
        inside = self.gpu.peer_bandwidth
        return inside if self.machines == 1 else min(inside, self.link)

    def with_gpus(self, gpus: int) -> "Cluster":
        return replace(self, gpus=gpus)

    def latency(self, operation: Operation) -> float:
        """Seconds of a collective that carries next to nothing.

        NCCL sums along a tree where that is quicker than a ring, and gathers along a ring.
        """
        W, machines = self.gpus, self.machines
        if W == 1:
            return 0.0
        if self.is_cpu:
            return _LOCAL_SECONDS
        steps, between = W - 1, (machines - 1 if machines > 1 else 0)
        ring = (steps - between) * _INSIDE + between * _BETWEEN_RING
        if operation == "all_gather":
            return _START + ring
        local = min(W, self.per_machine)
        tree = 2 * ((local - 1) * _INSIDE + floor(log2(machines)) * _BETWEEN_TREE)
        return _START + min(2 * ring, tree)

    def ring_bytes(self, operation: Operation, size: float) -> float:
        """Bytes that each rank sends: for the sum of `size` bytes, or so that all have all ranks' `size`."""
        W = self.gpus
        return 2 * (W - 1) / W * size if operation == "all_reduce" else (W - 1) * size

    def __str__(self) -> str:
        where = (
            "1 machine" if self.machines == 1 else f"{self.machines} machines, {self.link / 1e9:g} GB/s each"
        )
        return f"{self.gpus} x {self.gpu.name}, {where}"


def make_cluster(gpu: str, gpus: int, per_machine: int, link: float | None) -> Cluster:
    """`gpu` is a name of the table, perhaps with its memory as in v100-16gb, or "cpu"; `link` in GB/s.

    Without a link machines are joined by 100 Gb/s for each GPU. Raises `ConfigError`.
    """
    found = _cpu() if gpu.upper() == CPU else find_gpu(gpu)
    if found is None:
        names = ", ".join(sorted({g.name.lower().replace(" ", "-") for g in GPUS}))
        raise ConfigError(f"There are no figures of a GPU {gpu!r}; choose from {names}.")
    if gpus < 1 or per_machine < 1:
        raise ConfigError(
            f"A plan needs 1 GPU or more, and as many in a machine, not {gpus} and {per_machine} in each."
        )
    if link is not None and not 0 < link < float("inf"):
        raise ConfigError(f"--link must be the GB/s of a machine's network, such as 12.5, not {link:g}.")
    return Cluster(found, gpus, per_machine, 1e9 * link if link is not None else NETWORK * per_machine)


def _cpu() -> Gpu:
    """One thread of a processor; as its figures are reached ones, `REACHED` is taken out of them."""
    flops, bandwidth = (figure / REACHED for figure in CPU_THREAD)
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return Gpu(CPU, flops, flops, bandwidth, LOOPBACK / REACHED, memory)
