"""FFCV's dataset writer, made safe: it ends when a worker does, prints nothing, and its file is checked."""

import ctypes
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import cv2
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.memory_allocator import MemoryAllocator
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter

from pipelines.errors import DataError
from tools.convert.images import RgbImages
from tools.processes import PROCESSES, run_processes

MIN_PAGE_SIZE = 1 << 23
CHUNK = 16  # samples that a worker takes at a time


def write_beton(
    images: RgbImages,
    path: Path,
    *,
    max_side: int,
    quality: int,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Write `images` in order as fields `image` (JPEG, uint8 RGB) and `label` (int64); check the file.

    Raises `DataError` where a worker dies or the file does not hold what was written. On any exception the
    workers are stopped and `path` may hold a part of the dataset.
    """
    # An image must fit a page; even noise at quality 100 stays below 3 bytes per pixel.
    page_size = max(MIN_PAGE_SIZE, 1 << (3 * max_side**2 - 1).bit_length())
    fields = {
        "image": RGBImageField(write_mode="jpg", max_resolution=max_side, jpeg_quality=quality),
        "label": IntField(),
    }
    writer = _WatchedWriter(path, fields, page_size, workers, progress)
    writer.from_indexed_dataset(images, indices=range(len(images)), chunksize=CHUNK)
    check_beton(path, [file.label for file in images.files])


def check_beton(path: Path, labels: list[int]) -> None:
    """Raise `DataError` unless every sample has its label, its place in the file and a whole JPEG there."""
    broken = DataError(
        f"The dataset written to {path.parent} is not whole; check the disk, then convert again."
    )
    try:
        reader = Reader(str(path))
        image_N, label_N = (reader.metadata[name] for name in reader.metadata.dtype.names)
        table_N = reader.alloc_table[np.argsort(reader.alloc_table["sample_id"], kind="stable")]
        bytes_ = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError, AssertionError) as error:
        raise broken from error
    if not (
        np.array_equal(label_N, labels)
        and np.array_equal(table_N["sample_id"], np.arange(len(labels)))
        and np.array_equal(table_N["ptr"], image_N["data_ptr"])
        and table_N["size"].min() >= 4
        and (table_N["ptr"] + table_N["size"]).max() <= len(bytes_)
    ):
        raise broken
    start_N, end_N = table_N["ptr"], table_N["ptr"] + table_N["size"]
    marks_N4 = bytes_[np.stack([start_N, start_N + 1, end_N - 2, end_N - 1], axis=1)]
    if (marks_N4 != (0xFF, 0xD8, 0xFF, 0xD9)).any():  # a JPEG's first and last marker
        raise broken


class _WatchedWriter(DatasetWriter):
    """`DatasetWriter` whose parent process watches the workers instead of waiting for a count.

    The stock writer polls a counter that never reaches its end when a worker dies.
    """

    def __init__(
        self, path: Path, fields: dict, page_size: int, workers: int, progress: Callable[[int], None]
    ) -> None:
        super().__init__(str(path), fields, page_size=page_size, num_workers=workers)
        self.progress = progress

    def _write_common(
        self, num_samples: int, queue_content: Iterable, work_fn: Callable, extra_worker_args: tuple
    ) -> None:
        """Replaces the stock method of this name: the same jobs, in watched processes.

        1. Lay out the file and deal the chunks of samples out to the workers.
        2. Run the workers; each returns the places in the file that it took.
        3. Write metadata and allocation table; whatever happened, free the shared memory.
        """
        # 1.
        self.num_samples = num_samples
        self.prepare()
        chunks = list(queue_content)
        done = PROCESSES.Value(ctypes.c_uint64, 0)
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        # Its own counters belong to forked processes.
        allocator.next_page_allocated = PROCESSES.Value(ctypes.c_uint64, 0)
        allocator.next_page_written = PROCESSES.Value(ctypes.c_uint64, 0)
        arguments = (self.metadata_sm, self.metadata_type, self.fields, allocator, done)
        (images,) = extra_worker_args
        jobs = []
        for worker in range(self.num_workers):
            share = chunks[worker :: self.num_workers]
            own_images = images.only(index for chunk in share for _, index in chunk)
            jobs.append(partial(_write_share, work_fn, share, arguments, own_images))
        try:
            # 2.
            # The counter is read without its lock: a dead worker may hold it.
            shares = run_processes(jobs, lambda: self.progress(done.get_obj().value))
            # 3.
            self.finalize([allocation for share in shares for allocation in share])
        finally:
            self.metadata_sm.close()
            self.metadata_sm.unlink()


def _write_share(
    work_fn: Callable, chunks: list, arguments: tuple, images: RgbImages
) -> list[tuple[int, int, int]]:
    """Run FFCV's worker job on `chunks`; return its allocations: sample, address, size in bytes."""
    cv2.setNumThreads(0)  # one process per core is enough
    work: SimpleQueue = SimpleQueue()
    allocations: SimpleQueue = SimpleQueue()
    for chunk in [*chunks, None]:
        work.put(chunk)
    work_fn(work, *arguments, allocations, images)
    return allocations.get()
