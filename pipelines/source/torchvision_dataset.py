"""The datasets of torchvision, named `torchvision:NAME:ROOT` or `torchvision:NAME:ROOT:SPLIT`.

Shape legend: N samples of the source, K samples that are asked for, H, W height and width in pixels.
"""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.errors import DataError
from pipelines.source.base import Source, to_rgb, unreadable

TORCHVISION = "torchvision:"
# Where torchvision's classes keep one label per image, the first that is there; others count as unlabelled.
_LABELS = ("targets", "labels", "_labels")


class TorchvisionSource(Source):
    """A dataset in `torchvision.datasets` of images, already on disk: nothing is downloaded.

    `torchvision:CIFAR10:/data` takes the split that torchvision takes by default, mostly the training split;
    `torchvision:CIFAR10:/data:test` names another one. Images come as pixels, so only the loader `folder`
    reads them; asking for the size of one decodes it.
    """

    holds_raw = True

    def __init__(self, path: Path) -> None:
        """Raises `DataError` where there is no such dataset, or not of images."""
        self.path = path
        name, root, split = _parts(path)
        self._dataset = _open(path, name, root, split)
        self._sizes_N2 = np.zeros((len(self), 2), np.int32)  # 0: not decoded yet
        if not len(self):
            raise DataError(f"{path} holds no images; check the folder.")
        self.pixels(0)  # or it is no dataset of images
        labels_N = _labels_of(self._dataset, len(self))
        self.classes: list[str] = []
        self.labels_N = np.zeros(len(self), np.int64)
        if labels_N is not None:
            self.labels_N = labels_N
            names = getattr(self._dataset, "classes", ())
            num_classes = int(labels_N.max()) + 1
            self.classes = [
                str(name) for name in (names if len(names) >= num_classes else range(num_classes))
            ]

    def __len__(self) -> int:
        return len(self._dataset)

    def sizes(self, indices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for index in indices_K[self._sizes_N2[indices_K, 0] == 0].tolist():
            self.pixels(index)
        heights_K, widths_K = self._sizes_N2[indices_K].T
        return heights_K, widths_K

    def pixels(self, index: int) -> np.ndarray:
        try:
            sample = self._dataset[index]
            image = sample[0] if isinstance(sample, tuple) else sample
            if not isinstance(image, Image.Image):
                raise TypeError(f"it is no image but a {type(image).__name__}")
            pixels_HW3 = np.asarray(to_rgb(image))
        except Exception as error:  # whatever the dataset's class or Pillow raises for a damaged file
            raise unreadable(self.name(index), error) from error
        self._sizes_N2[index] = pixels_HW3.shape[:2]
        return pixels_HW3

    def encoded(self, index: int) -> np.ndarray:
        raise DataError(f"The {self.name(index)} comes as pixels, not as a file; set data.loader to folder.")

    def name(self, index: int) -> str:
        return f"sample {index} of {self.path}"


def _parts(path: Path) -> tuple[str, str, str]:
    """Name, root and split (or "") in `torchvision:NAME:ROOT:SPLIT`. Raises `DataError`."""
    name, root, *split = [*str(path).removeprefix(TORCHVISION).split(":"), ""][:3]
    if not name or not root or str(path).count(":") > 3:
        raise DataError(
            f"{path} does not name a dataset; write torchvision:NAME:ROOT or torchvision:NAME:ROOT:SPLIT, "
            "such as torchvision:CIFAR10:/data:test."
        )
    return name, root, "".join(split)


def _open(path: Path, name: str, root: str, split: str) -> Any:
    """The dataset. Raises `DataError` where the class is none, wants more than a root, or finds no data."""
    from torchvision import datasets

    make = getattr(datasets, name, None)
    parameters = inspect.signature(make).parameters if inspect.isclass(make) else {}
    if name not in datasets.__all__ or "root" not in parameters:
        raise DataError(f"torchvision.datasets has no {name} to read from a folder; check data.path, {path}.")
    arguments: dict[str, Any] = {"download": False} if "download" in parameters else {}
    if split:
        arguments |= _split_argument(path, name, list(parameters), split)
    try:
        return make(root, **arguments)
    except Exception as error:  # the classes raise many kinds where files or packages are missing
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise DataError(
            f"torchvision cannot open {path} ({reason}); put the dataset there, as nothing is downloaded."
        ) from error


def _split_argument(path: Path, name: str, parameters: list[str], split: str) -> dict[str, Any]:
    """How the class is told which split to take."""
    if "split" in parameters:
        return {"split": split}
    if "image_set" in parameters:
        return {"image_set": split}
    if "train" in parameters and split in ("train", "test"):
        return {"train": split == "train"}
    splits = "train or test" if "train" in parameters else "none"
    raise DataError(
        f"{name} of torchvision has no split '{split}' ({splits} to choose); check data.path, {path}."
    )


def _labels_of(dataset: Any, num_samples: int) -> np.ndarray | None:
    """int64 (N,), or None where the dataset does not hold one label from 0 on for each image."""
    for name in _LABELS:
        labels_N = np.asarray(getattr(dataset, name, None))
        if labels_N.shape == (num_samples,) and labels_N.dtype.kind in "iu" and labels_N.min() >= 0:
            return labels_N.astype(np.int64)
    return None
