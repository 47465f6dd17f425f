"""Images as files in folders.

Shape legend: N samples of the source, K samples that are asked for, C classes.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from pipelines.errors import DataError
from pipelines.source.base import Source, unreadable

# Parts of a dataset; a folder that holds nothing else is not a folder of classes.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class FolderSource(Source):
    """Images in one sub-folder per class, in the order of torchvision's `ImageFolder`; or images without
    labels in a folder that has no sub-folders, in the order of their names.
    """

    def __init__(self, path: Path) -> None:
        """Raises `DataError` where the folder holds no images, or not in one of these two ways; `OSError`."""
        self.path = path
        self.classes, has_images, is_empty = [], False, True
        with os.scandir(path) as found:
            for entry in found:
                is_empty = False
                if entry.is_dir():
                    self.classes.append(entry.name)
                else:
                    has_images = has_images or is_image_name(entry.name)
        self.classes.sort()
        if is_empty:
            raise DataError(f"The folder {path} is empty; put one sub-folder of images per class into it.")
        self._check_layout(has_images)

        labels = {name: label for label, name in enumerate(self.classes)} or {"": 0}
        samples = make_dataset(path, labels, IMG_EXTENSIONS, allow_empty=True)
        self._files = [file for file, _ in samples]
        self.labels_N = np.array([label for _, label in samples], dtype=np.int64)
        counts_C = np.bincount(self.labels_N, minlength=len(self.classes))
        if not counts_C.all():
            folder = path / self.classes[int(counts_C.argmin())]
            raise DataError(f"The class folder {folder} holds no images; remove it or put images into it.")
        self._sizes_N2 = np.zeros((len(samples), 2), dtype=np.int32)  # 0: header not read yet

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

    def _check_layout(self, has_images: bool) -> None:
        path, classes = self.path, self.classes
        if has_images and classes:
            raise DataError(
                f"The folder {path} holds images and also sub-folders such as {classes[0]}; put them all "
                "into one sub-folder per class, or run `fastbarlow convert --unlabelled`."
            )
        if not has_images and not classes:
            raise DataError(
                f"The folder {path} has no class sub-folders; put the images into one sub-folder per class."
            )
        if classes and {name.lower() for name in classes} <= PARTS:
            raise DataError(
                f"{path} holds the parts {', '.join(classes)} of a dataset, not classes; "
                f"set data.path to one of them, such as {path / classes[0]}."
            )


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image, by the endings that torchvision's `ImageFolder` takes."""
    return name.lower().endswith(IMG_EXTENSIONS)
