"""Images prepared on threads: the reading of files and Pillow's work leave Python's lock alone.

Shape legend: N entries of the source, B bytes.
"""

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from pipelines.errors import DataError
from tools.convert.images import BadImage, Stored, is_kept, is_shortage, prepare
from tools.convert.jpeg import read_layouts
from tools.convert.manifest import ConvertSettings
from tools.convert.sources import ImageSet
from tools.convert.target import SAMPLE

CHUNK = 64  # entries that a thread takes at a time, at most
CHUNK_BYTES = 2 << 20  # that they may come to, at most, unless a single one is larger
CHUNKS_AHEAD = 8  # of each thread, done or in work before they are asked for: some take long


class Chunk(NamedTuple):
    """Work for a thread."""

    entries: range  # of the source
    bytes: int  # of memory that they may take


class Prepared(NamedTuple):
    """What becomes of consecutive entries."""

    samples_N: np.ndarray  # SAMPLE; of an entry that is left out nothing but the label
    reasons: list[str | None]  # why it is left out
    pieces: list[bytes | memoryview]  # all images in a row; one piece may hold several

    @property
    def num_bytes(self) -> int:
        """Of all images."""
        return int(self.samples_N["size"].sum(dtype=np.int64))


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


class Memory:
    """Memory for the files of chunks, used again when nothing points there any more: new one costs time."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque()

    def take(self, size: int) -> np.ndarray:
        """uint8 (size,). Raises `MemoryError`."""
        if size > CHUNK_BYTES + 1:
            return np.empty(size, np.uint8)
        try:
            whole = self._free.pop()
        except IndexError:
            whole = np.empty(CHUNK_BYTES + 1, np.uint8)
        taken = whole[:size]
        weakref.finalize(taken, self._free.append, whole).atexit = False
        return taken


def chunks(images: ImageSet, settings: ConvertSettings, start: int, stop: int) -> Iterator[Chunk]:
    """The entries `start` to `stop` in chunks. What is stored does not depend on where they end."""
    most_pixels = 0 if settings.storage == "jpg" else 3 * settings.max_side**2
    first, total = start, 0
    for entry in range(start, stop):
        size = max(images.size(entry), most_pixels)
        if entry > first and (entry - first >= CHUNK or total + size > CHUNK_BYTES):
            yield Chunk(range(first, entry), total)
            first, total = entry, 0
        total += size
    if first < stop:
        yield Chunk(range(first, stop), total)


def in_order(
    pool: ThreadPoolExecutor, workers: int, job: Callable[[range], Prepared], work: Iterable[Chunk]
) -> Iterator[Prepared]:
    """`job` of each chunk, in order, with at most `CHUNKS_AHEAD` per thread in memory; fewer large ones.

    `workers`: threads of the pool.
    """
    most = CHUNKS_AHEAD * workers
    pending: deque[tuple[Future[Prepared], int]] = deque()
    waiting = 0  # bytes
    for chunk in work:
        while pending and (len(pending) >= most or waiting + chunk.bytes > most * CHUNK_BYTES):
            result, size = pending.popleft()
            waiting -= size
            yield result.result()
        pending.append((pool.submit(job, chunk.entries), chunk.bytes))
        waiting += chunk.bytes
    while pending:
        yield pending.popleft()[0].result()


def prepare_entries(
    images: ImageSet, settings: ConvertSettings, max_bytes: int, memory: Memory, entries: range
) -> Prepared:
    """What becomes of these entries; runs on a thread of the pool.

    1. Read the files together, without Python's lock. Those JPEGs that `prepare` would keep stay there.
    2. Prepare the others one by one.

    Raises `DataError` where the source as a whole is gone, or memory or file descriptors run out:
    the image may be good.
    """
    samples_N = np.zeros(len(entries), SAMPLE)
    samples_N["label"] = [images.label(entry) for entry in entries]
    reasons: list[str | None] = [None] * len(entries)
    size_N = np.array([images.size(entry) for entry in entries], np.int64)
    start_N = np.cumsum(size_N) - size_N
    try:  # 1.
        data_B = memory.take(int(size_N.sum()) + 1)
    except MemoryError as error:
        raise _shortage(images, entries.start, error) from error
    is_read_N = images.read_together(entries, size_N, data_B)
    is_kept_N = _keep(data_B, size_N, is_read_N, settings, max_bytes, samples_N)
    view, pieces = memoryview(data_B), []
    for i, (start, size) in enumerate(zip(start_N.tolist(), size_N.tolist(), strict=True)):
        if is_kept_N[i]:
            end = start + int(samples_N["size"][i])
            if pieces and isinstance(pieces[-1], slice) and pieces[-1].stop == start:
                start = pieces.pop().start
            pieces.append(slice(start, end))
            continue
        data = bytes(view[start : start + size]) if is_read_N[i] else None  # 2.
        result = _prepare_one(images, settings, max_bytes, entries[i], data)
        if isinstance(result, str):
            reasons[i] = result
        else:
            shape, label = (result.height, result.width), samples_N["label"][i]
            samples_N[i] = (result.is_raw, result.was_copied, *shape, label, len(result.encoded))
            pieces.append(result.encoded)
    # A few small images would keep the memory of all.
    is_worthwhile = 2 * samples_N["size"][is_kept_N].sum(dtype=np.int64) >= len(data_B)
    take = view.__getitem__ if is_worthwhile else lambda part: bytes(view[part])
    return Prepared(
        samples_N, reasons, [take(piece) if isinstance(piece, slice) else piece for piece in pieces]
    )


def _keep(
    data_B: np.ndarray,
    size_N: np.ndarray,
    is_read_N: np.ndarray,
    settings: ConvertSettings,
    max_bytes: int,
    samples_N: np.ndarray,
) -> np.ndarray:
    """Which of the files are JPEGs to be kept as they are, bool (N,); `samples_N` gets their samples."""
    if settings.check != "structure":
        return np.zeros(len(size_N), bool)
    found = read_layouts(data_B, size_N, is_read_N)
    is_kept_N = found.is_whole_N & ~found.is_suspicious_N & (found.end_N <= max_bytes)
    is_kept_N &= is_kept(settings, found.is_plain_N, found.height_N, found.width_N, found.end_N)
    for column, value_N in (("height", found.height_N), ("width", found.width_N), ("size", found.end_N)):
        samples_N[column][is_kept_N] = value_N[is_kept_N]
    samples_N["was_copied"] = is_kept_N
    return is_kept_N


def _prepare_one(
    images: ImageSet, settings: ConvertSettings, max_bytes: int, entry: int, data: bytes | None
) -> Stored | str:
    """An image, or why it is left out; `data`: its file, if that has been read."""
    try:
        stored = prepare(images.read(entry) if data is None else data, settings)
        if len(stored.encoded) > max_bytes:
            return f"{len(stored.encoded)} bytes are more than the {max_bytes} that fit a page"
        return stored
    except BadImage as error:
        return str(error)
    except (OSError, MemoryError, RuntimeError) as error:
        if is_shortage(error):
            raise _shortage(images, entry, error) from error
        if not isinstance(error, OSError):
            raise
        _check_source(images, error)
        return f"cannot be read: {error.strerror or error}"


def _shortage(images: ImageSet, entry: int, error: Exception) -> DataError:
    what = error.strerror if isinstance(error, OSError) and error.strerror else "out of memory"
    return DataError(
        f"The machine gave out at {images.name(entry)} ({what}); run the same command with fewer "
        "workers or a higher limit (ulimit): it goes on where this one stopped."
    )


def _check_source(images: ImageSet, error: OSError) -> None:
    """Raise `DataError` where not one file but the source itself can no longer be read."""
    try:
        images.path.stat()
    except OSError:
        raise DataError(
            f"The source {images.path} can no longer be read ({error.strerror or error}); "
            "bring it back, then run the same command again: it goes on where it stopped."
        ) from error
