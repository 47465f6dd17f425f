"""The loaders by name, and what they share: which samples a rank loads, and the numbers drawn for them."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pkgutil import resolve_name

import numpy as np
import torch

from pipelines.batch import Batch, Loader, ViewParams
from pipelines.config import DataConfig
from pipelines.draw import draw_views
from pipelines.errors import DataError
from pipelines.order import epoch_permutation, rank_slice, steps_per_epoch
from pipelines.threads import keep_torch_threads

# Classes constructed from a `LoaderJob`; their modules, and the heavy libraries with them, load on demand.
LOADERS = {
    "folder": "pipelines.folder_loader:FolderLoader",
    "ffcv": "pipelines.ffcv_loader:FfcvLoader",
    "dali": "pipelines.dali_loader:DaliLoader",
    "synthetic": "pipelines.synthetic_loader:SyntheticLoader",
}


def build_loader(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Loader:
    """The loader that `config` names, for one rank of `world_size`; `batch_size` is the global batch.

    Batches arrive on `device`. Raises `DataError` for a dataset that is missing or damaged, a batch that is
    larger than it or cannot be split over the ranks, and a loader whose library is not installed.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # threads start with another one
    job = LoaderJob(config, seed, batch_size, rank, world_size, device)
    try:
        with keep_torch_threads():
            return resolve_name(LOADERS[config.loader])(job)
    except ModuleNotFoundError as error:
        raise DataError(
            f"The loader '{config.loader}' needs the Python package '{error.name}'; "
            "install it or choose another data.loader."
        ) from error


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

    def batches(self, num_samples: int, epoch: int, start_step: int) -> Iterator[np.ndarray]:
        """int64 sample indices of each of this rank's batches `start_step`, ... of `epoch`."""
        permutation = epoch_permutation(num_samples, self.seed, epoch)
        for step in range(start_step, self.steps_per_epoch(num_samples)):
            yield rank_slice(permutation, step, self.batch_size, self.rank, self.world_size)

    def draw(
        self, epoch: int, indices_N: np.ndarray, heights_N: np.ndarray, widths_N: np.ndarray
    ) -> ViewParams:
        """The numbers of both views of these samples, on the CPU."""
        return draw_views(self.config.augment.views, self.seed, epoch, indices_N, heights_N, widths_N)


class EpochLoader(ABC):
    """A `pipelines.batch.Loader` that runs one epoch at a time, as a generator: a new one ends the last."""

    def __init__(self, job: LoaderJob, num_samples: int) -> None:
        self.num_samples = num_samples
        self.steps_per_epoch = job.steps_per_epoch(num_samples)
        self._job = job
        self._running: Generator[Batch, None, None] | None = None

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        self._end_epoch()
        self._running = self._load(epoch, self._job.batches(self.num_samples, epoch, start_step))
        return self._running

    def close(self) -> None:
        self._end_epoch()

    def _end_epoch(self) -> None:
        if self._running is not None:
            self._running.close()

    @abstractmethod
    def _load(self, epoch: int, batches: Iterator[np.ndarray]) -> Generator[Batch, None, None]:
        """Load the batches of these sample indices; closing the generator ends what runs for them."""
