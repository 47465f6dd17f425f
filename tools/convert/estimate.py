"""How long a conversion will take and how much room it needs, from a trial on some of the images."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from rich.filesize import decimal

from pipelines.errors import DataError
from tools.convert.pool import Prepared
from tools.convert.target import Target

TRIALS = 128  # images, in evenly spread groups
_GROUP = 4
ENOUGH = 32  # of them, to judge from
_ERRORS = 4  # standard errors of the trial's mean within which a shortage of room is not certain


@dataclass(frozen=True)
class Estimate:
    """What is known before a conversion begins."""

    entries: int  # of the source
    done: int  # of them, by an earlier conversion
    bytes: int | None  # that are still to be written; None where too few images are left for a trial
    seconds: float | None  # that it will take
    free_bytes: int  # in the file system of the target


def estimate(
    done: int,
    entries: int,
    job: Callable[[range], Prepared],
    target: Target,
    pool: ThreadPoolExecutor,
) -> Estimate:
    """For the entries `done` to `entries`, which `job` prepares.

    Raises `DataError` where the target's file system is certainly too small.
    """
    folder = target.part.parent
    free = shutil.disk_usage(folder).free
    left = entries - done
    # At most a twentieth of the work is done twice, and less where that suffices.
    num_groups = min(TRIALS, max(left // 50, min(ENOUGH, left // 20))) // _GROUP
    if not num_groups:
        return Estimate(entries, done, None, None, free)
    job(range(done, done + 1))  # the first one loads what all need
    start = time.monotonic()
    places = np.linspace(done, entries - _GROUP, num_groups).astype(int).tolist()
    groups = pool.map(job, (range(place, place + _GROUP) for place in places))
    sizes = np.concatenate([group.samples_N["size"] for group in groups]).astype(float)
    seconds = (time.monotonic() - start) * left / len(sizes)
    needed = target.files_bytes(left, int(sizes.mean() * left))
    certain = sizes.mean() - _ERRORS * sizes.std() / len(sizes) ** 0.5
    if len(sizes) >= ENOUGH and target.files_bytes(left, int(certain * left)) > free:
        raise DataError(
            f"The dataset needs about {decimal(needed)}, and only {decimal(free)} are free in {folder}; "
            "free some space or choose another target."
        )
    return Estimate(entries, done, needed, seconds, free)
