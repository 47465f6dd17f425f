"""How fast the storage gives the dataset's own bytes, in the order in which the loader asks for them.

Shape legend: K samples that are read.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.epoch_loader import LoaderJob
from pipelines.source import BetonSource, Source, open_source
from tools.bench.loader_usage import cpu_seconds

MAX_SAMPLES, MAX_BYTES = 16384, 256 << 20
PROBED = 64  # samples of which it is asked whether the system holds them in memory
CACHED = 0.5  # with more of them in memory, what is measured is memory


def measure_reading(job: LoaderJob, seconds: float) -> dict[str, Any] | None:
    """Read samples once, from the storage and not from memory if that can be had.

    1. This rank's samples of the second half of an epoch, which the other parts of a profile do not read.
    2. Have the system drop what it holds of them.
    3. Read them as the loader does: mapped, or each from its file; on the loader's threads, for `seconds`.

    `cached` is the share of them that was in memory before 2, and `cold` says whether 2 has helped; both are
    None where the system does not tell. None where the samples are not files. Raises `DataError`.
    """
    source = open_source(job.config.path)
    indices_K = _samples(job, source)  # 1
    extents = list(source.extents(indices_K))
    if not extents:
        return None
    cached = _share_in_memory(extents)
    _drop(extents)  # 2
    left = _share_in_memory(extents)
    # DALI is fed files by one thread, but takes the bytes of a mapped file itself.
    is_fed = job.config.loader == "dali" and not isinstance(source, BetonSource)
    threads = 1 if is_fed else max(1, job.config.workers)
    cpu, start = cpu_seconds(), time.perf_counter()
    samples, num_bytes = _read(source, indices_K, threads, start + seconds)  # 3
    elapsed = time.perf_counter() - start
    return {
        "pairs_per_second": samples / elapsed,
        "cores_used": (cpu_seconds() - cpu) / elapsed,
        "bytes_per_second": num_bytes / elapsed,
        "threads": threads,
        "cached": cached,
        "cold": None if left is None else left < CACHED,
    }


def _samples(job: LoaderJob, source: Source) -> np.ndarray:
    """int64 (K,): `MAX_SAMPLES` of this rank's, or as many as half an epoch has."""
    half = job.steps_per_epoch(len(source)) // 2
    batches = -(-MAX_SAMPLES // job.batch_per_rank)
    tasks = islice(job.tasks(len(source), source, 0, half), batches)
    indices_K = np.concatenate([task.indices_N for task in takewhile(lambda task: not task.epoch, tasks)])
    sizes_K = [length for _, _, length in source.extents(indices_K)]
    first_beyond = int(np.searchsorted(np.cumsum(sizes_K), MAX_BYTES)) if sizes_K else len(indices_K)
    return indices_K[: max(1, first_beyond)]


def _drop(extents: list[tuple[Path, int, int]]) -> None:
    with ExitStack() as files:
        opened: dict[Path, int] = {}
        for path, offset, length in extents:
            if path not in opened:
                if len(opened) > 256:  # a process may keep only so many open
                    files.pop_all().close()
                    opened.clear()
                opened[path] = files.enter_context(path.open("rb")).fileno()
            os.posix_fadvise(opened[path], offset, length, os.POSIX_FADV_DONTNEED)


def _share_in_memory(extents: list[tuple[Path, int, int]]) -> float | None:
    """How many of the samples the system gives without waiting for the storage; None if it does not tell."""
    found = []
    for place in np.linspace(0, len(extents) - 1, min(PROBED, len(extents))).round().astype(int):
        path, offset, length = extents[place]
        with path.open("rb") as file:
            try:
                given = os.preadv(file.fileno(), [bytearray(length)], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                given = 0
            except OSError:  # not all file systems know it
                return None
        found.append(given == length)
    return sum(found) / len(found)


def _read(source: Source, indices_K: np.ndarray, threads: int, deadline: float) -> tuple[int, int]:
    """Samples and bytes that were read before the deadline, at least one sample for each thread."""
    remaining = iter(indices_K.tolist())  # which the threads share

    def work() -> tuple[int, int]:
        samples = num_bytes = 0
        while not samples or time.perf_counter() < deadline:
            index = next(remaining, None)
            if index is None:
                break
            stored = source.pixels(index) if source.holds_raw else None
            stored = source.encoded(index) if stored is None else stored
            num_bytes += stored.copy().nbytes  # what is mapped is read only where it is touched
            samples += 1
        return samples, num_bytes

    with ThreadPoolExecutor(threads) as pool:
        done = [future.result() for future in [pool.submit(work) for _ in range(threads)]]
    samples, num_bytes = (sum(column) for column in zip(*done, strict=True))
    return samples, num_bytes
