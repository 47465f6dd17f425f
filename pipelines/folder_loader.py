"""The reference loader: PIL in the worker processes of torch's `DataLoader`. Reads every kind of source."""

from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipelines.augment.reference import crop_and_resize
from pipelines.batch import NUM_VIEWS, Batch, ViewParams
from pipelines.errors import DataError
from pipelines.loaders import EpochLoader, LoaderJob
from pipelines.source import Source, open_source, read_image
from pipelines.workers import LOST_WORKER, be_quiet_about_a_lost_consumer, stop_workers

Task = tuple[int, np.ndarray]  # epoch and sample indices of one batch
Loaded = tuple[Tensor, ViewParams, Tensor, Tensor]  # the fields of `Batch`, on the CPU


class FolderLoader(EpochLoader):
    """The workers live from the first epoch until `close`."""

    def __init__(self, job: LoaderJob) -> None:
        source = open_source(job.config.path)
        super().__init__(job, len(source))
        self._tasks = _Tasks()
        workers = job.config.workers
        self._workers = DataLoader(
            _Batches(source, job),
            batch_size=None,  # a task is a whole batch: its numbers are drawn in one go
            sampler=self._tasks,
            num_workers=workers,
            collate_fn=_as_is,
            prefetch_factor=-(-job.config.prefetch // workers) if workers else None,
            persistent_workers=workers > 0,
            pin_memory=job.device.type == "cuda",
            worker_init_fn=be_quiet_about_a_lost_consumer,
        )

    def close(self) -> None:
        super().close()
        self._stop_workers()

    def _stop_workers(self) -> None:
        stop_workers(self._workers._iterator)
        self._workers._iterator = None

    def _load(self, epoch: int, batches: Iterator[np.ndarray]) -> Generator[Batch, None, None]:
        self._tasks.remaining = ((epoch, indices_N) for indices_N in batches)
        device = self._job.device
        for loaded in self._loaded():
            if isinstance(loaded, DataError):
                raise loaded
            views_VNHWC, params, labels_N, indices_N = loaded
            yield Batch(
                views_VNHWC.to(device, non_blocking=True),
                params.to(device, non_blocking=True),
                labels_N.to(device, non_blocking=True),
                indices_N.to(device, non_blocking=True),
            )

    def _loaded(self) -> Iterator[Loaded | DataError]:
        """What the workers return; a worker that dies is a `DataError` too."""
        try:
            yield from self._workers
        except LOST_WORKER as error:
            self._stop_workers()
            raise DataError(
                "A worker process of the folder loader ended unexpectedly, probably for lack of (shared) "
                f"memory; lower data.workers or train.batch_size ({error})."
            ) from error


class _Tasks(Sampler[Task]):
    """Hands the tasks of the running epoch to the workers."""

    def __init__(self) -> None:
        self.remaining: Iterator[Task] = iter(())

    def __iter__(self) -> Iterator[Task]:
        return self.remaining


class _Batches(Dataset[Loaded | DataError]):
    """Loads a batch in a worker. A bad image is returned, not raised: torch would add its own traceback."""

    def __init__(self, source: Source, job: LoaderJob) -> None:
        self._source, self._job = source, job

    def __getitem__(self, task: Task) -> Loaded | DataError:
        try:
            return self._load(*task)
        except DataError as error:
            return error

    def _load(self, epoch: int, indices_N: np.ndarray) -> Loaded:
        source, size = self._source, self._job.config.image_size
        params = self._job.draw(epoch, indices_N, *source.sizes(indices_N))
        views_VNHWC = np.empty((NUM_VIEWS, len(indices_N), size, size, 3), dtype=np.uint8)
        for n, index in enumerate(indices_N):
            image = read_image(source, index)
            for v in range(NUM_VIEWS):
                views_VNHWC[v, n] = crop_and_resize(image, params.box_VN4[v, n].tolist(), size)
        labels_N = torch.from_numpy(source.labels_N[indices_N])
        return torch.from_numpy(views_VNHWC), params, labels_N, torch.from_numpy(indices_N)


def _as_is(loaded: Loaded | DataError) -> Loaded | DataError:
    return loaded
