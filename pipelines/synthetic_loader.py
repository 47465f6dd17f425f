"""Random views that cost nothing to load: to measure everything but the loading.

The pixels are made once and are always the same; order, labels and numbers are those of a dataset of
ImageNet's size with images of 500 x 375 pixels.
"""

from collections.abc import Generator, Iterator

import numpy as np
import torch

from pipelines.batch import NUM_VIEWS, Batch, to_device
from pipelines.epoch_loader import EpochLoader, LoaderJob, Task
from pipelines.prefetch import prefetch

NUM_SAMPLES = 1_281_167
NUM_CLASSES = 1000
HEIGHT, WIDTH = 375, 500


class SyntheticLoader(EpochLoader):
    """`config.path` is not read."""

    def __init__(self, job: LoaderJob) -> None:
        super().__init__(job, NUM_SAMPLES)
        shape = (NUM_VIEWS, job.batch_per_rank, job.config.image_size, job.config.image_size, 3)
        generator = torch.Generator(job.device).manual_seed(job.seed)
        self._views_VNHWC = torch.randint(
            256, shape, dtype=torch.uint8, device=job.device, generator=generator
        )

    def _stream(self, tasks: Iterator[Task]) -> Generator[Batch, None, None]:
        return prefetch(self._batches_of(tasks), self._job.config.prefetch, self._job.device)

    def _batches_of(self, tasks: Iterator[Task]) -> Generator[Batch, None, None]:
        job = self._job
        heights_N, widths_N = np.full(job.batch_per_rank, HEIGHT), np.full(job.batch_per_rank, WIDTH)
        for task in tasks:
            params = to_device(job.draw(task.epoch, task.indices_N, heights_N, widths_N), job.device)
            indices_N = to_device(torch.from_numpy(task.indices_N), job.device)
            yield Batch(self._views_VNHWC, params, indices_N % NUM_CLASSES, indices_N)
