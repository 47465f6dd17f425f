"""Steps that take turns: time, phases and memory of each.

Shape legend: V views (2), N samples, C colours (3), H and W pixels.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from itertools import cycle, islice, repeat
from typing import Any, NamedTuple

import psutil
import torch

from pipelines.augment import distort
from pipelines.config import DataConfig
from pipelines.loaders import build_loader
from tools.bench.memory import peak_bytes, return_freed_memory
from tools.bench.step_authors import AuthorsStep, authors_precision
from tools.bench.timing import MIN_WARMUP, PhaseTimer, drop, endless, synchronise, warmup_batches
from train.config import RunConfig
from train.distributed import World
from train.loop import build_twin, configure_backends
from train.step import TrainStep

OURS, UNDISTORTED, AUTHORS = "ours", "ours, views given", "authors"
READY_BATCHES = 4  # enough that their numbers differ

Mark = Callable[[str], None]
Opened = tuple[Callable[[Any, int], Any], Iterator[Any]]  # the step, and endless batches for it


class Contender(NamedTuple):
    """What is measured: a step with its batches, built anew for each turn."""

    name: str
    precision: str
    open: Callable[[Mark], AbstractContextManager[Opened]]
    to_drop: int = 0  # batches that its loader has ready when nobody takes any


class Turn(NamedTuple):
    seconds: float  # of a step
    phases: dict[str, float]  # seconds of each phase of a step
    peak_bytes: int | None  # of the GPU, all that the step holds included


def contenders(config: RunConfig, live: DataConfig | None, device: torch.device) -> list[Contender]:
    """Our step with and without distortions, the authors', and ours with the loader that `live` describes."""
    precision = config.train.precision
    synthetic = _with_data(config, config.data.model_copy(update={"loader": "synthetic"}))
    # Views that the loader has distorted are only normalised.
    undistorted = synthetic.data.augment.model_copy(update={"implementation": "dali"})
    given = _with_data(config, synthetic.data.model_copy(update={"augment": undistorted}))
    found = [
        Contender(OURS, precision, partial(_open_ours, synthetic, device)),
        Contender(UNDISTORTED, precision, partial(_open_ours, given, device)),
        Contender(AUTHORS, authors_precision(config, device), partial(_open_authors, synthetic, device)),
    ]
    if live is not None:
        opening = partial(_open_ours, _with_data(config, live), device, is_live=True)
        found.append(Contender(f"ours, loader {live.loader}", precision, opening, warmup_batches(live)))
    return found


def measure(contender: Contender, steps: int, device: torch.device) -> Turn:
    """One turn: a fresh network, a warm-up, and `steps` steps by the clock."""
    _release(device)
    on_gpu = device.type == "cuda"
    warmup = MIN_WARMUP if on_gpu else 1
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    timer = PhaseTimer(device)
    with contender.open(timer.mark) as (step, batches):
        for number in range(warmup + steps):
            if number == warmup - 1:
                drop(batches, contender.to_drop)
            if number == warmup:
                timer.clear()
                synchronise(device)
                start = time.perf_counter()
            timer.start()
            batch = next(batches)
            timer.mark("data wait")
            step(batch, number)
        synchronise(device)
        seconds = (time.perf_counter() - start) / steps
        peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
        return Turn(seconds, timer.mean_seconds(), peak)


def measure_resident_peaks(config: RunConfig, world: World) -> dict[str, int]:
    """For each contender with synthetic input the bytes of this process, only if it is fresh and on the CPU.

    These are all that its network, optimiser, batches and steps add. Libraries load before, for a small twin.
    """
    return_freed_memory()
    small = config.model.model_copy(update={"backbone": "resnet18", "projector": "8-8"})
    for contender in contenders(config.model_copy(update={"model": small}), None, world.device):
        _resident_peak(contender, world.device)
    found = contenders(config, None, world.device)
    return {contender.name: _resident_peak(contender, world.device) for contender in found}


def _resident_peak(contender: Contender, device: torch.device) -> int:
    _release(device)
    process, held = psutil.Process(), []
    held.append(process.memory_info().rss)
    with contender.open(lambda phase: None) as (step, batches):

        def one_step() -> None:
            held.append(process.memory_info().rss)
            step(next(batches), 0)

        peak = peak_bytes(one_step, device)  # beyond what was held before the last of its calls
        return held[-1] - held[0] + peak


@contextmanager
def _open_ours(
    config: RunConfig, device: torch.device, mark: Mark, *, is_live: bool = False
) -> Iterator[Opened]:
    """From a loader at work if `is_live`, else from batches that it has made before."""
    configure_backends(config)
    loader = build_loader(config.data, seed=config.seed, batch_size=config.train.batch_size, device=device)
    with closing(loader):
        batches = endless(loader)
        with closing(batches):
            step = TrainStep(config, build_twin(config, device).train(), loader.steps_per_epoch, mark)
            yield step, batches if is_live else cycle(list(islice(batches, READY_BATCHES)))
    if config.train.compile:
        torch.compiler.reset()  # what is compiled counts against a limit and holds the network


@contextmanager
def _open_authors(config: RunConfig, device: torch.device, mark: Mark) -> Iterator[Opened]:
    """From views as the authors' `DataLoader` yields them: distorted, float32, contiguous."""
    configure_backends(config)
    loader = build_loader(config.data, seed=config.seed, batch_size=config.train.batch_size, device=device)
    with closing(loader):
        batch = next(iter(loader.epoch(0)))
        views_VNCHW = distort(batch.views_VNHWC, batch.params, config.data.augment, torch.float32)
        views_VNCHW = views_VNCHW.contiguous()  # what it is made of must not count as theirs
        del batch
        yield AuthorsStep(config, device, loader.steps_per_epoch, mark), repeat(views_VNCHW)


def _with_data(config: RunConfig, data: DataConfig) -> RunConfig:
    return config.model_copy(update={"data": data})


def _release(device: torch.device) -> None:
    """Free what the contender before has left, so that the next one finds the memory empty."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
