"""What all loaders share: which samples a rank loads, their numbers, and the position in the data."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from pipelines.bad_samples import BadSamples
from pipelines.batch import Batch, ViewParams
from pipelines.config import DataConfig
from pipelines.draw import draw_views
from pipelines.errors import DataError
from pipelines.order import epoch_permutation, rank_slice, samples_ahead, steps_per_epoch
from pipelines.source import Source


class Task(NamedTuple):
    """One batch of one rank."""

    epoch: int
    step: int  # in the epoch
    indices_N: np.ndarray  # int64: the samples that the order prescribes


@dataclass(frozen=True)
class LoaderJob:
    """What a loader is asked for: this rank's share of each global batch, and the numbers for it."""

    config: DataConfig
    seed: int
    batch_size: int  # global
    rank: int
    world_size: int
    device: torch.device

    @property
    def batch_per_rank(self) -> int:
        return self.batch_size // self.world_size

    def steps_per_epoch(self, num_samples: int) -> int:
        """Raises `DataError` where the batch does not fit the dataset or the number of ranks."""
        return steps_per_epoch(num_samples, self.batch_size, self.world_size)

    def tasks(self, num_samples: int, source: Source | None, epoch: int, start_step: int) -> Iterator[Task]:
        """This rank's batches from `start_step` of `epoch` on, without end: the next epochs follow.

        Storage that reads by groups is told of the samples some way ahead.
        """
        groups_G = None if source is None else source.group_sizes_G
        ahead = 0 if groups_G is None else samples_ahead(groups_G)
        for later in count(epoch):
            permutation = epoch_permutation(num_samples, self.seed, later, groups_G)
            told = start_step * self.batch_size
            for step in range(start_step, self.steps_per_epoch(num_samples)):
                if ahead:
                    tell = (step + 1) * self.batch_size + ahead
                    source.read_ahead(permutation[told:tell])
                    told = tell
                indices_N = rank_slice(permutation, step, self.batch_size, self.rank, self.world_size)
                yield Task(later, step, indices_N)
            start_step = 0

    def draw(
        self, epoch: int, indices_N: np.ndarray, heights_N: np.ndarray, widths_N: np.ndarray
    ) -> ViewParams:
        """The numbers of both views of these samples, on the CPU."""
        return draw_views(self.config.augment.views, self.seed, epoch, indices_N, heights_N, widths_N)


class EpochLoader(ABC):
    """A `pipelines.batch.Loader` over one stream of batches that runs on from each epoch into the next."""

    def __init__(self, job: LoaderJob, num_samples: int, source: Source | None = None) -> None:
        """`source` is what the samples are read from, unless they are made up."""
        self.num_samples = num_samples
        self._source = source
        self.steps_per_epoch = job.steps_per_epoch(num_samples)
        self._job = job
        self._bad = BadSamples(num_samples, stop=job.config.on_bad_sample == "stop")
        self._position = 0, 0  # epoch and step of the batch that the consumer gets next
        self._batches: Generator[Batch, None, None] | None = None  # the stream, which stands at `_upcoming`
        self._upcoming = 0, 0
        self._running: Generator[Batch, None, None] | None = None

    @property
    def bad_samples(self) -> Mapping[int, str]:
        return self._bad.reasons

    def epoch(self, epoch: int | None = None, start_step: int = 0) -> Generator[Batch, None, None]:
        if self._running is not None:
            self._running.close()
        if epoch is not None:
            self._position = epoch, start_step
        self._running = self._to_end_of_epoch()
        return self._running

    def state_dict(self) -> dict[str, int]:
        epoch, step = self._position
        return {"epoch": epoch, "step": step, **self._identity}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for name, ours in self._identity.items():
            if state[name] != ours:
                raise DataError(
                    f"The position in the data was saved with {name} {state[name]}, but now it is {ours}; "
                    "go on with the same dataset, seed and global batch."
                )
        self._position = state["epoch"], state["step"]

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        self._end_stream()

    @property
    def _identity(self) -> dict[str, int]:
        return {
            "num_samples": self.num_samples,
            "seed": self._job.seed,
            "batch_size": self._job.batch_size,
        }

    def _to_end_of_epoch(self) -> Generator[Batch, None, None]:
        epoch, step = self._position
        if step < self.steps_per_epoch and (self._batches is None or self._upcoming != self._position):
            self._end_stream()
            self._batches = self._stream(self._job.tasks(self.num_samples, self._source, epoch, step))
        while step < self.steps_per_epoch:
            try:
                batch = next(self._batches)
                step += 1
                self._position = (epoch, step) if step < self.steps_per_epoch else (epoch + 1, 0)
                self._upcoming = self._position
            except BaseException:  # Ctrl-C, too, which may come between any two lines
                self._end_stream()
                raise
            yield batch

    def _end_stream(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    @abstractmethod
    def _stream(self, tasks: Iterator[Task]) -> Generator[Batch, None, None]:
        """Load the batches of these tasks; closing the generator ends what runs for it."""
