"""Where the samples live: the labels, image sizes and encoded bytes of any kind of dataset."""

from collections.abc import Callable
from pathlib import Path

from pipelines.errors import DataError
from pipelines.source.base import Source, decode_rgb, read_image
from pipelines.source.beton import (
    BETON_ALLOCATION,
    BETON_FIELD,
    BETON_HEADER,
    BETON_IMAGE,
    BETON_VERSION,
    BetonSource,
)
from pipelines.source.files import FileSource
from pipelines.source.folder import FolderSource
from pipelines.source.layouts import names_layout, open_layout
from pipelines.source.shards import ShardSource, holds_shards
from pipelines.source.torchvision_dataset import TORCHVISION, TorchvisionSource
from pipelines.source.voc import Voc07Source

__all__ = [
    "BETON_ALLOCATION",
    "BETON_FIELD",
    "BETON_HEADER",
    "BETON_IMAGE",
    "BETON_VERSION",
    "BetonSource",
    "FileSource",
    "FolderSource",
    "ShardSource",
    "Source",
    "TorchvisionSource",
    "Voc07Source",
    "decode_rgb",
    "names_layout",
    "open_layout",
    "open_source",
    "read_image",
]


def open_source(path: Path) -> Source:
    """The source at `path`:

    - a .beton file;
    - a folder of shards that `fastbarlow convert` has written;
    - any other folder: one sub-folder per class, or images without labels;
    - `torchvision:NAME:ROOT`, a dataset of torchvision; see `TorchvisionSource`;
    - `places205:ROOT`, `inat18:ROOT`, `voc07:ROOT`: data sets as published; see `pipelines.source.layouts`.

    Raises `DataError` where `path` is missing, unreadable or none of these, or the dataset is damaged.
    """
    path = Path(path)
    try:
        return _kind_of(path)(path)
    except OSError as error:
        raise DataError(
            f"The dataset {path} cannot be read ({error.strerror}); check data.path and its permissions."
        ) from error


def _kind_of(path: Path) -> Callable[[Path], Source]:
    if str(path).startswith(TORCHVISION):
        return TorchvisionSource
    if names_layout(path):
        return open_layout
    if path.is_dir():
        return ShardSource if holds_shards(path) else FolderSource
    if not path.exists():
        raise DataError(f"There is no dataset at {path}; check data.path.")
    if path.suffix != ".beton":
        raise DataError(f"{path} is neither a folder nor a .beton file; set data.path to one of these.")
    return BetonSource
