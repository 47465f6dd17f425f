"""Images as files in folders.

Shape legend: N samples of the source, C classes.
"""

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from pipelines.errors import DataError
from pipelines.source.files import FileSource

# Parts of a dataset; a folder that holds nothing else is not a folder of classes.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class FolderSource(FileSource):
    """Images in one sub-folder per class, in the order of torchvision's `ImageFolder`; or images without
    labels in a folder that has no sub-folders, in the order of their names.
    """

    def __init__(self, path: Path) -> None:
        """Raises `DataError` where the folder holds no images, or not in one of these two ways; `OSError`."""
        classes, has_images, is_empty = [], False, True
        with os.scandir(path) as found:
            for entry in found:
                is_empty = False
                if entry.is_dir():
                    classes.append(entry.name)
                else:
                    has_images = has_images or is_image_name(entry.name)
        classes.sort()
        if is_empty:
            raise DataError(f"The folder {path} is empty; put one sub-folder of images per class into it.")
        _check_layout(path, classes, has_images)

        labels = {name: label for label, name in enumerate(classes)} or {"": 0}
        samples = make_dataset(path, labels, IMG_EXTENSIONS, allow_empty=True)
        labels_N = np.array([label for _, label in samples], dtype=np.int64)
        counts_C = np.bincount(labels_N, minlength=len(classes))
        if not counts_C.all():
            folder = path / classes[int(counts_C.argmin())]
            raise DataError(f"The class folder {folder} holds no images; remove it or put images into it.")
        super().__init__(path, classes, [file for file, _ in samples], labels_N)


def _check_layout(path: Path, classes: list[str], has_images: bool) -> None:
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
