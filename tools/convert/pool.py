"""Images prepared on threads: Pillow's work and the reading of files leave Python's lock alone."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from pipelines.errors import DataError
from tools.convert.images import BadImage, Stored, is_shortage, prepare
from tools.convert.manifest import ConvertSettings
from tools.convert.sources import ImageSet

CHUNK = 4  # entries that a thread takes at a time
CHUNKS_AHEAD = 2  # of each thread, done or in work before they are asked for

Result = Stored | str  # an image, or why it is left out


@contextmanager
def threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads end with the block, at once when it is left by an exception."""
    pool = ThreadPoolExecutor(workers, "prepare")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities in single images
            yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_entries(
    images: ImageSet, settings: ConvertSettings, max_bytes: int, entries: range
) -> list[Result]:
    """What becomes of these entries; runs on a thread of the pool.

    Raises `DataError` where the source as a whole is gone, or memory or file descriptors run out:
    the image may be good.
    """
    results: list[Result] = []
    for entry in entries:
        try:
            stored = prepare(images.read(entry), settings)
            if len(stored.encoded) > max_bytes:
                raise BadImage(f"{len(stored.encoded)} bytes are more than the {max_bytes} that fit a page")
            results.append(stored)
        except BadImage as error:
            results.append(str(error))
        except (OSError, MemoryError, RuntimeError) as error:
            if is_shortage(error):
                what = error.strerror if isinstance(error, OSError) and error.strerror else "out of memory"
                raise DataError(
                    f"The machine gave out at {images.name(entry)} ({what}); run the same command with fewer "
                    "workers or a higher limit (ulimit): it goes on where this one stopped."
                ) from error
            if not isinstance(error, OSError):
                raise
            _check_source(images, error)
            results.append(f"cannot be read: {error.strerror or error}")
    return results


def _check_source(images: ImageSet, error: OSError) -> None:
    """Raise `DataError` where not one file but the source itself can no longer be read."""
    try:
        images.path.stat()
    except OSError:
        raise DataError(
            f"The source {images.path} can no longer be read ({error.strerror or error}); "
            "bring it back, then run the same command again: it goes on where it stopped."
        ) from error


def in_order(
    pool: ThreadPoolExecutor, workers: int, job: Callable[[range], list[Result]], start: int, stop: int
) -> Iterator[list[Result]]:
    """`job` of the entries `start` to `stop`, a chunk at a time and in order, with few chunks in memory.

    `workers`: threads of the pool.
    """
    pending: deque[Future[list[Result]]] = deque()
    for first in range(start, stop, CHUNK):
        if len(pending) >= CHUNKS_AHEAD * workers:
            yield pending.popleft().result()
        pending.append(pool.submit(job, range(first, min(first + CHUNK, stop))))
    while pending:
        yield pending.popleft().result()
