"""Reads FFCV's .beton files: compiled threads decode each image once and write both crops, as PIL would.

Only the format is FFCV's. Its own runtime decodes an image once per view, with a rougher DCT, resizes without
a bicubic filter, makes Python dicts over all samples, and lets the consumer wait for ever where its thread
fails.

Memory: `prefetch` + 2 batches of 2 * batch_per_rank * image_size^2 * 3 bytes (pinned where they go to a GPU)
and a decoded image per thread; the file itself is mapped, so that what the system caches of it is shared by
all ranks of a machine.

Shape legend: V views (2), N samples of this rank's batch, S image size in pixels.
"""

from collections.abc import Generator, Iterator

import numpy as np
import torch

from pipelines.augment.reference import crop_views
from pipelines.batch import NUM_VIEWS, Batch, to_device
from pipelines.epoch_loader import EpochLoader, LoaderJob, Task
from pipelines.errors import DataError
from pipelines.prefetch import prefetch
from pipelines.sample_reader import SampleReader
from pipelines.source import BetonSource, open_source
from pipelines.two_crops import decode_and_crop


class FfcvLoader(EpochLoader):
    """Reads .beton files only."""

    def __init__(self, job: LoaderJob) -> None:
        source = open_source(job.config.path)
        if not isinstance(source, BetonSource):
            raise DataError(
                f"The loader 'ffcv' reads .beton files, not {source.path}; "
                "run `fastbarlow convert` first or set data.loader to folder or dali."
            )
        super().__init__(job, len(source), source)
        self._reader = SampleReader(source, job, self._bad)
        self._threads = max(job.config.workers, 1)

    def _stream(self, tasks: Iterator[Task]) -> Generator[Batch, None, None]:
        return prefetch(self._batches_of(tasks), self._job.config.prefetch, self._job.device)

    def _batches_of(self, tasks: Iterator[Task]) -> Generator[Batch, None, None]:
        for task in tasks:
            yield to_device(self._load(task), self._job.device)

    def _load(self, task: Task) -> Batch:
        """1. draw  2. decode and crop all samples  3. read by PIL those that libjpeg-turbo refuses"""
        source, size = self._source, self._job.config.image_size
        indices_N, params = self._reader.draw(task.epoch, task.indices_N)  # 1

        shape = NUM_VIEWS, len(indices_N), size, size, 3
        views_VNHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=self._job.device.type == "cuda")
        status_N = decode_and_crop(  # 2
            source.file, *source.stored(indices_N), params.box_VN4.numpy(), views_VNHWC.numpy(), self._threads
        )

        for n in np.flatnonzero(status_N):  # 3
            image, indices_N, params = self._reader.image(n, task.epoch, indices_N, params)
            crop_views(image, params.box_VN4[:, n], views_VNHWC[:, n].numpy())
        return self._reader.batch(views_VNHWC, params, indices_N)
