"""The reference loader: PIL in the worker processes of torch's `DataLoader`. Reads every kind of source."""

from collections.abc import Generator, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipelines.augment.reference import crop_views
from pipelines.bad_samples import BadSamples
from pipelines.batch import NUM_VIEWS, Batch
from pipelines.epoch_loader import EpochLoader, LoaderJob, Task
from pipelines.errors import DataError
from pipelines.sample_reader import SampleReader
from pipelines.source import Source, open_source
from pipelines.workers import start_worker, stop_workers, taken

ADVICE = "lower data.workers or train.batch_size"
Loaded = tuple[Batch, dict[int, str]] | DataError  # a batch, and all bad samples that its worker knows


class FolderLoader(EpochLoader):
    """The workers live from the first batch until `close`."""

    def __init__(self, job: LoaderJob) -> None:
        source = open_source(job.config.path)
        super().__init__(job, len(source), source)
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
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # for the seeds of workers that draw nothing; else the global one
        )

    def close(self) -> None:
        super().close()
        self._stop_workers()

    def _stop_workers(self) -> None:
        stop_workers(self._workers._iterator)
        self._workers._iterator = None

    def _stream(self, tasks: Iterator[Task]) -> Generator[Batch, None, None]:
        self._tasks.remaining = tasks
        try:
            for loaded in taken(iter(self._workers), ADVICE):
                if isinstance(loaded, DataError):
                    raise loaded
                batch, bad = loaded
                for index in bad.keys() - self._bad.reasons.keys():
                    self._bad.report(index, DataError(bad[index]))
                yield batch.to(self._job.device, non_blocking=True)
        except DataError:
            self._stop_workers()  # the next epoch starts others
            raise


class _Tasks(Sampler[Task]):
    """Hands the tasks of the running stream to the workers."""

    def __init__(self) -> None:
        self.remaining: Iterator[Task] = iter(())

    def __iter__(self) -> Iterator[Task]:
        return self.remaining


class _Batches(Dataset[Loaded]):
    """Loads a batch in a worker. An error is returned, not raised: torch would add its own traceback."""

    def __init__(self, source: Source, job: LoaderJob) -> None:
        self._size = job.config.image_size
        self._bad = BadSamples(len(source), stop=job.config.on_bad_sample == "stop", log=False)
        self._reader = SampleReader(source, job, self._bad)

    def __getitem__(self, task: Task) -> Loaded:
        try:
            return self._load(task), self._bad.reasons
        except DataError as error:
            return error

    def _load(self, task: Task) -> Batch:
        indices_N, params = self._reader.draw(task.epoch, task.indices_N)
        shape = NUM_VIEWS, len(indices_N), self._size, self._size, 3
        views_VNHWC = torch.empty(shape, dtype=torch.uint8)
        for n in range(len(indices_N)):
            image, indices_N, params = self._reader.image(n, task.epoch, indices_N, params)
            crop_views(image, params.box_VN4[:, n], views_VNHWC[:, n].numpy())
        return self._reader.batch(views_VNHWC, params, indices_N)


def _as_is(loaded: Loaded) -> Loaded:
    return loaded
