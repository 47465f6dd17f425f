"""The loaders by name."""

from pkgutil import resolve_name

import torch

from pipelines.batch import Loader
from pipelines.config import DataConfig
from pipelines.epoch_loader import LoaderJob
from pipelines.errors import DataError

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
        return resolve_name(LOADERS[config.loader])(job)
    except ModuleNotFoundError as error:
        raise DataError(
            f"The loader '{config.loader}' needs the Python package '{error.name}'; "
            "install it or choose another data.loader."
        ) from error
