"""Streams of pairs that take turns: pairs per second and CPU time of each."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pipelines.config import AugmentConfig
from tools.bench.loader_usage import PeakMemory, cpu_seconds
from tools.bench.timing import drop, synchronise


@dataclass(frozen=True)
class Setting:
    """What is the same for all that is measured."""

    image_size: int
    batch_size: int
    workers: int  # threads or processes
    device: torch.device  # that batches are delivered to
    augment: AugmentConfig


@dataclass(frozen=True)
class Contender:
    """What is measured: an endless stream, built anew for each turn and ended after it."""

    name: str
    delivers: str  # "crops", "views", or what a stage does
    open: Callable[[], AbstractContextManager[Iterator[Any]]]
    pairs: int  # in each item of the stream
    warmup: int  # items that are taken before the clock starts: more than are made ahead
    cycle: int = 1  # items that come about together, from workers that take turns; never cut apart


class Turn(NamedTuple):
    pairs_per_second: float
    cores: float  # CPU seconds, child processes included, for each second

    @property
    def pairs_per_core_second(self) -> float:
        return self.pairs_per_second / self.cores


def measure(contender: Contender, seconds: float, device: torch.device) -> Turn:
    """Take whole cycles from a new stream until that many seconds have passed."""
    with contender.open() as stream:
        drop(stream, contender.warmup)
        synchronise(device)
        cpu, start, items = cpu_seconds(), time.perf_counter(), 0
        while items == 0 or items % contender.cycle or time.perf_counter() - start < seconds:
            next(stream)
            items += 1
        synchronise(device)
        elapsed = time.perf_counter() - start
        return Turn(items * contender.pairs / elapsed, (cpu_seconds() - cpu) / elapsed)


def peak_memory(contender: Contender, device: torch.device) -> int | None:
    """Bytes that the stream takes on the host at its peak, beyond what stays once it has been used.

    1. A first stream loads libraries and compiles code, which is not counted.
    2. A second one runs until it has made ahead all that it will, and has gone round its workers.
    """
    with contender.open() as stream:
        next(stream)  # 1
        synchronise(device)
    with PeakMemory() as peak, contender.open() as stream:
        drop(stream, contender.warmup + contender.cycle)  # 2
        synchronise(device)
    return peak.bytes
