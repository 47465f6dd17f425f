"""Where the images of a conversion come from: folders, and tar archives that stay packed."""

import os
from pathlib import Path

from pipelines.errors import DataError
from pipelines.source import names_layout
from tools.convert.sources.base import ImageSet, ListedImages, is_image_name, printable
from tools.convert.sources.folder import is_folder, list_folder
from tools.convert.sources.labels import set_ground_truth
from tools.convert.sources.layout import list_layout
from tools.convert.sources.subset import keep_subset
from tools.convert.sources.tars import is_compressed, list_archive, list_shards

__all__ = ["ImageSet", "open_image_set", "printable"]


def open_image_set(
    source: Path, *, ground_truth: Path | None = None, subset: Path | None = None, unlabelled: bool = False
) -> ImageSet:
    """The images at `source`, listed but not read:

    - a folder with one sub-folder per class, or (also with `unlabelled`) of images; see `list_folder`;
    - a tar archive; see `list_archive`;
    - tar shards: a folder of `.tar` files, in the order of their names, or a `.txt` list of their paths, one
      a line, relative to the list; see `list_shards`;
    - `places205:ROOT` or `inat18:ROOT`, with `:val` behind for the other part; see `list_layout`.

    `ground_truth` labels images without labels; see `set_ground_truth`. `subset` lists what to take; see
    `keep_subset`. Raises `DataError` for what cannot be read, is none of these, or holds no images.
    """
    reading = source
    try:
        images = _open(Path(source), unlabelled)
        if not len(images):
            raise DataError(f"{printable(source)} holds no images; give a folder or tar archive of images.")
        if ground_truth is not None:
            reading = ground_truth
            set_ground_truth(images, Path(ground_truth))
        if subset is not None:
            reading = subset
            keep_subset(images, Path(subset))
    except OSError as error:
        where = printable(error.filename or reading)
        raise DataError(
            f"{where} cannot be read: {error.strerror}; check the path and its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(reading)} is not text in UTF-8; give a list of lines.") from error
    return images


def _open(source: Path, unlabelled: bool) -> ListedImages:
    if names_layout(source):
        return list_layout(source)
    if not source.exists():
        raise DataError(f"The source {printable(source)} does not exist; give a folder or a tar archive.")
    if source.is_dir():
        shards = _shards_in(source)
        return (
            list_shards(source, shards, unlabelled=unlabelled)
            if shards
            else list_folder(source, unlabelled=unlabelled)
        )
    if not source.is_file():
        raise DataError(f"The source {printable(source)} is no file; give a folder or a tar archive.")
    if source.suffix == ".txt":
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
        shards = [source.parent / line for line in lines if line]
        if not shards:
            raise DataError(f"The list {source} is empty; write the path of one tar archive on each line.")
        return list_shards(source, shards, unlabelled=unlabelled)
    compression = is_compressed(source)
    if compression:
        raise DataError(
            f"{printable(source)} is compressed ({compression}); unpack it to a plain tar archive first."
        )
    return list_archive(source, unlabelled=unlabelled)


def _shards_in(folder: Path) -> list[Path]:
    """The archives of a folder that holds neither images nor folders."""
    shards = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_folder(entry) or is_image_name(os.fsencode(entry.name)):
                return []
            if entry.name.endswith(".tar"):
                shards.append(folder / entry.name)
    shards.sort()
    if any(file.name.startswith("ILSVRC2012_img_") for file in shards):
        raise DataError(f"The folder {folder} holds several data sets; name one, such as {shards[0]}.")
    return shards
