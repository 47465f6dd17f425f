"""The source side of a conversion: which files there are, which of them are images, and their pixels."""

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, has_file_allowed_extension, make_dataset

from pipelines.errors import DataError
from pipelines.source import decode_rgb
from tools.processes import PROCESSES, run_processes

MAX_SOURCE_SIDE = 65535  # JPEG's limit, and that of the size fields of FFCV's format


class ImageFile(NamedTuple):
    """One candidate: the file and the position of its class. Small, as there may be millions."""

    path: str
    label: int


def list_images(source: Path) -> tuple[list[str], list[ImageFile]]:
    """Class names and all files below them, in the order of torchvision's `ImageFolder`.

    A sub-folder without files stays a class, so that labels do not depend on what a class holds.
    Raises `DataError` where `source` is missing, empty or without sub-folders.
    """
    try:
        classes, class_to_idx = find_classes(source)
        files = make_dataset(source, class_to_idx, is_valid_file=lambda _: True, allow_empty=True)
    except FileNotFoundError as error:
        if not source.exists():
            raise DataError(
                f"The image folder {source} does not exist; give a folder with one sub-folder per class."
            ) from error
        state = "has no sub-folders" if any(source.iterdir()) else "is empty"
        raise DataError(
            f"The image folder {source} {state}; put the images into one sub-folder per class."
        ) from error
    except OSError as error:
        raise DataError(
            f"The image folder {source} cannot be read: {error.strerror}; give a readable folder "
            "with one sub-folder per class."
        ) from error
    return classes, [ImageFile(path, label) for path, label in files]


def find_fault(file: ImageFile, max_side: int) -> str | None:
    """Why `file` cannot be in the dataset, or None. Decodes the whole image.

    `max_side`: longest side of a stored image, in pixels. Raises `MemoryError`: the image may be good.
    """
    path = Path(file.path)
    if not has_file_allowed_extension(path.name, IMG_EXTENSIONS):
        return f"the name does not end in {', '.join(IMG_EXTENSIONS)}"
    try:
        if not path.is_file():  # opening a pipe or a device might wait for ever
            return "not a file" if path.exists() else "the link leads nowhere"
        if path.stat().st_size == 0:
            return "the file is empty"
        with Image.open(path) as image:
            width, height = image.size
        if max(width, height) > MAX_SOURCE_SIDE:
            return f"{width} x {height} pixels: a side exceeds {MAX_SOURCE_SIDE}"
        if int(max_side / max(width, height) * min(width, height)) < 1:  # FFCV's arithmetic
            return f"{width} x {height} pixels: nothing is left of the shorter side at max_side {max_side}"
        decode_rgb(path)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "not an image"
    except OSError as error:
        return f"cannot be read: {error.strerror}" if error.strerror else f"damaged: {error}"
    except Exception as error:  # Pillow's format plug-ins raise many kinds for damaged files
        return f"damaged: {type(error).__name__}: {error}"
    return None


def find_faults(
    files: list[ImageFile], max_side: int, workers: int, progress: Callable[[int], None]
) -> list[str | None]:
    """`find_fault` of each file, in order, over `workers` processes; `progress` gets the number done.

    Raises `DataError` where a process dies.
    """
    workers = min(workers, len(files))
    done = PROCESSES.Value(ctypes.c_uint64, 0)
    shares = run_processes(
        [partial(_find_share, files[worker::workers], max_side, done) for worker in range(workers)],
        lambda: progress(done.get_obj().value),  # without the lock: a dead worker may hold it
    )
    faults: list[str | None] = [None] * len(files)
    for worker, share in enumerate(shares):
        faults[worker::workers] = share
    return faults


def _find_share(files: list[ImageFile], max_side: int, done: Any) -> list[str | None]:
    faults = []
    for file in files:
        faults.append(find_fault(file, max_side))
        with done.get_lock():
            done.value += 1
    return faults


class RgbImages:
    """The indexable dataset that FFCV's writer reads: (uint8 pixels (height, width, 3), label)."""

    def __init__(self, files: Sequence[ImageFile] | Mapping[int, ImageFile]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Raises `DataError` where the file is no longer what it was when it was checked."""
        file = self.files[index]
        try:
            return np.asarray(decode_rgb(Path(file.path))), file.label
        except MemoryError:
            raise
        except Exception as error:
            raise DataError(
                f"{file.path} changed or vanished during the conversion ({error}); convert again."
            ) from error

    def only(self, indices: Iterable[int]) -> "RgbImages":
        """The images at these positions, at the same positions: less to send to a worker than all."""
        return RgbImages({index: self.files[index] for index in indices})


def printable(path: str | Path) -> str:
    """A file name as text that JSON takes; bytes that are not UTF-8 appear as backslash escapes."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")
