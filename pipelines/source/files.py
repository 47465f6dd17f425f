"""Images that each are a file, whatever says which.

Shape legend: N samples of the source, K samples that are asked for.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.errors import DataError
from pipelines.source.base import Source, unreadable


class FileSource(Source):
    """Files in a given order, with their labels."""

    def __init__(self, path: Path, classes: list[str], files: Sequence[str], labels_N: np.ndarray) -> None:
        """`path`: what messages call the source. `files`: where each sample lies."""
        self.path, self.classes, self.labels_N = path, classes, labels_N
        self._files = files
        self._sizes_N2 = np.zeros((len(files), 2), dtype=np.int32)  # 0: header not read yet

    def __len__(self) -> int:
        return len(self._files)

    def sizes(self, indices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for index in indices_K[self._sizes_N2[indices_K, 0] == 0]:
            try:
                with Image.open(self._files[index]) as image:
                    self._sizes_N2[index] = image.height, image.width
            except Exception as error:  # Pillow's format plug-ins raise many kinds for damaged files
                raise unreadable(self.name(index), error) from error
        heights_K, widths_K = self._sizes_N2[indices_K].T
        return heights_K, widths_K

    def encoded(self, index: int) -> np.ndarray:
        try:
            return np.fromfile(self._files[index], dtype=np.uint8)
        except OSError as error:
            raise unreadable(self.name(index), error) from error

    def extents(self, indices_K: np.ndarray) -> Iterator[tuple[Path, int, int]]:
        for index in indices_K:
            file = Path(self._files[index])
            yield file, 0, file.stat().st_size

    def name(self, index: int) -> str:
        return self._files[index]


def check_present(files: Sequence[str], listed_in: Path) -> None:
    """Raise `DataError` where a file that `listed_in` lists is not there.

    Each folder is listed once, which for a million files is a thousand times fewer calls than one for each.
    """
    present: dict[str, set[str]] = {}
    absent = []
    for file in files:
        folder, _, name = file.rpartition("/")
        if folder not in present:
            present[folder] = _names_in(folder)
        if name not in present[folder]:
            absent.append(file)
    if absent:
        raise DataError(
            f"{len(absent):,} of the {len(files):,} images that {listed_in} lists are absent, such as "
            f"{absent[0]}; unpack the images again."
        )


def _names_in(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 (names, not paths)
    except (FileNotFoundError, NotADirectoryError):
        return set()
