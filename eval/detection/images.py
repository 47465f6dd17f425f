"""Images with boxes around their objects, in the form that all datasets share, and how they are read.

Boxes are (x1, y1, x2, y2) in pixels from the upper left corner of the image, such that x2 - x1 is the width.

Shape legend: O objects of an image, C colours (3), H and W pixels.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from pipelines.errors import DataError
from pipelines.source.base import decode_rgb

Target = dict[str, Tensor]  # boxes (O, 4) float32; labels (O,) int64; masks (O, H, W) uint8 if there are any
Sample = tuple[Tensor, Target]  # the image, (C, H, W) uint8


@dataclass(frozen=True)
class ImageRecord:
    """What the annotations say about an image."""

    path: Path
    image_id: int
    height: int
    width: int
    boxes_O4: np.ndarray  # float32
    labels_O: np.ndarray  # int64, from 1 on: 0 is the background
    difficult_O: np.ndarray  # bool: not to be counted in tests
    segmentations: list[Any] | None = None  # COCO's polygons or run lengths, one for each object


class AnnotatedImages:
    """The records of a dataset, packed into two arrays.

    As Python objects those of COCO would be copied page by page into every process that decodes: counting
    references writes to memory.
    """

    def __init__(self, path: Path, classes: list[str], records: Iterable[ImageRecord]) -> None:
        self.path = path  # of the annotations
        self.classes = classes  # the first one has label 1
        packed = [pickle.dumps(record) for record in records]
        self._ends_N = np.cumsum([len(record) for record in packed], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends_N)

    def __getitem__(self, index: int) -> ImageRecord:
        start = self._ends_N[index - 1] if index else 0
        return pickle.loads(self._bytes[start : self._ends_N[index]])


def read_sample(record: ImageRecord, flip: bool) -> Sample:
    """The decoded image and what is to be learnt from it, both mirrored left to right if `flip`.

    Raises `DataError` where the image cannot be read, or has another size than the annotations say.
    """
    try:
        image = decode_rgb(BytesIO(record.path.read_bytes()))
    except Exception as error:  # Pillow's format plug-ins raise many kinds for damaged files
        raise DataError(f"Cannot read the image {record.path} ({error}); replace it.") from error
    size = record.height, record.width
    if (image.height, image.width) != size:
        raise DataError(
            f"The image {record.path} has {image.width} x {image.height} pixels, but its annotation says "
            f"{record.width} x {record.height}; replace one of them."
        )
    pixels_CHW = transforms.pil_to_tensor(image)
    boxes_O4 = tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes_O4), format="XYXY", canvas_size=size)
    parts: dict[str, Tensor] = {"boxes": boxes_O4, "labels": torch.from_numpy(record.labels_O)}
    if record.segmentations is not None:
        parts["masks"] = tv_tensors.Mask(_masks(record))
    if flip:
        pixels_CHW = transforms.horizontal_flip(pixels_CHW)
        for name in parts.keys() - {"labels"}:
            parts[name] = transforms.horizontal_flip(parts[name])
    return pixels_CHW, {name: part.as_subclass(Tensor) for name, part in parts.items()}


def _masks(record: ImageRecord) -> Tensor:
    """(O, H, W) uint8, 1 inside the object."""
    from pycocotools import mask

    size = record.height, record.width
    masks = []
    for segmentation in record.segmentations:
        try:
            if isinstance(segmentation, list):
                segmentation = mask.merge(mask.frPyObjects(segmentation, *size))
            elif isinstance(segmentation["counts"], list):
                segmentation = mask.frPyObjects(segmentation, *size)
            mask_HW = mask.decode(segmentation)
        except Exception as error:  # the compiled reader checks little, and raises what comes
            raise DataError(f"The annotation of {record.path} has no readable outline ({error}).") from error
        if mask_HW.shape != size:
            raise DataError(f"An outline in the annotation of {record.path} is for an image of another size.")
        masks.append(torch.from_numpy(mask_HW))
    return torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)


def checked_boxes(boxes_O4: np.ndarray, height: int, width: int, where: str) -> np.ndarray:
    """The boxes as float32, clipped to the image, since some of every dataset overhang by a pixel.

    Raises `DataError` where one has no area, or lies outside of the image; `where` names the annotation.
    """
    boxes_O4 = np.asarray(boxes_O4, dtype=np.float64).reshape(-1, 4)
    clipped_O4 = boxes_O4.clip(0, np.array([width, height, width, height])).astype(np.float32)
    for box, clipped in zip(boxes_O4, clipped_O4, strict=True):
        shown = "(" + ", ".join(f"{side:g}" for side in box) + ")"
        if not np.isfinite(box).all() or (box[2:] <= box[:2]).any():
            raise DataError(f"The box {shown} in {where} has no area; correct it or take it out.")
        if (clipped[2:] <= clipped[:2]).any():
            raise DataError(
                f"The box {shown} in {where} lies outside of the image of {width} x {height} pixels; "
                f"correct it or take it out."
            )
    return clipped_O4


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what goes wrong inside, where annotations are read from `path`, into a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"There is no {error.filename or path}; check the path of the dataset.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    except KeyError as error:
        raise DataError(f"{path} is not an annotation as expected: it lacks {error}.") from error
    except (ValueError, TypeError, AttributeError, IndexError, SyntaxError, RecursionError) as error:
        raise DataError(f"{path} is damaged, or not an annotation as expected ({error}).") from error


def path_finder(folder: Path, listed_in: Path) -> Callable[[str], Path]:
    """A function from an image's name to its path in `folder`, which raises `DataError` for a missing one.

    The folder is listed once: asking for each file by itself takes minutes on a network's file system.
    """
    with explained(folder):
        present = {path.name for path in folder.iterdir()}

    def path_of(name: str) -> Path:
        if name not in present:
            raise DataError(
                f"{listed_in} lists the image {name}, but it is not in {folder}; complete the dataset."
            )
        return folder / name

    return path_of
