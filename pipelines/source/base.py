"""What every source of images offers, and the decoding of one image, shared by all of them.

Shape legend: N samples of the source, K samples that are asked for, H, W height and width in pixels.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.errors import DataError

MAX_LABEL = 1 << 20
MAX_PIXELS = 400_000_000  # of an image: 20,000 x 20,000, since there are panoramas of 20,000 x 9,000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # with more Pillow warns, with twice as many it refuses


class Source(ABC):
    """A set of images with random access, labelled or not."""

    path: Path
    classes: list[str]  # empty where there are no labels
    labels_N: np.ndarray  # int64; all 0 without labels. Shards read all of them for it: see `labels`
    holds_raw: bool = False  # whether some images are stored as pixels, without a file to decode
    # int64: how many consecutive samples each read of the storage should fetch, in the order of the samples;
    # None where any order is as good. For `pipelines.order.epoch_permutation`.
    group_sizes_G: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sizes(self, indices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 heights and widths in pixels, as stored (an EXIF orientation is not applied).

        Raises `DataError` that names the sample where the start of its file cannot be read.
        """

    @abstractmethod
    def encoded(self, index: int) -> np.ndarray:
        """uint8: the bytes of the image file; may be read-only.

        Raises `DataError` where the file cannot be read or the image is stored as raw pixels.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """The sample's name for messages."""

    def pixels(self, index: int) -> np.ndarray | None:
        """uint8 (H, W, 3), RGB, of an image that is stored as raw pixels; None for a file."""
        return None

    def labels(self, indices_K: np.ndarray) -> np.ndarray:
        """int64 labels of these samples, with no more reading than these need."""
        return self.labels_N[indices_K]

    def extents(self, indices_K: np.ndarray) -> Iterator[tuple[Path, int, int]]:
        """Where these samples lie on the disk: file, offset and bytes; nothing where that is unknown."""
        return iter(())

    def read_ahead(self, indices_K: np.ndarray) -> None:  # noqa: B027 (most have nothing to do)
        """Have the storage fetch the groups of these samples, where there are groups.

        Returns before all of it is there, but may wait for some of it: better not called where a step waits.
        """


def read_image(source: Source, index: int) -> Image.Image:
    """The decoded RGB image, of the size that `source.sizes` states.

    Raises `DataError` that names the sample where it cannot be decoded, or has another size.
    """
    pixels_HW3 = source.pixels(index)
    if pixels_HW3 is not None:
        return Image.fromarray(pixels_HW3)
    encoded = source.encoded(index)
    try:
        image = decode_rgb(BytesIO(encoded))
    except Exception as error:  # Pillow's format plug-ins raise many kinds for damaged files
        raise unreadable(source.name(index), error) from error
    (height,), (width,) = source.sizes(np.array([index]))
    if image.size != (width, height):  # crop boxes would be those of another image
        raise DataError(
            f"The image {source.name(index)} is of {image.width} x {image.height} pixels, not {width} x "
            f"{height} as stated; it is damaged or was changed, so convert the images again."
        )
    return image


def decode_rgb(file: Path | BinaryIO, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The RGB image in a file of any mode; a JPEG at reduced scale if that has `at_least` (width, height).

    Raises what Pillow raises, and `ValueError` for 32-bit pixels.
    """
    with Image.open(file) as image:
        if at_least is not None:
            image.draft(None, at_least)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB. Raises what Pillow raises, and `ValueError` for 32-bit pixels."""
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit values at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32-bit pixels have no fixed range")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def unreadable(name: str, error: Exception) -> DataError:
    """What to raise for an image, from what Pillow or the system raised."""
    if isinstance(error, UnidentifiedImageError):
        reason = "no known image format"
    else:
        text = getattr(error, "strerror", None) or str(error)
        reason = text.partition("\n")[0] or type(error).__name__
    return DataError(f"The image {name} cannot be read ({reason}); remove it or convert the images again.")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest that lies with a converted dataset; it has a list `classes`.

    Raises `DataError` where it is none.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content["classes"], list):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a manifest with a list 'classes'; convert again or remove it."
        ) from error
    return content


def wrong_number_of_images(manifest: Path, dataset: Path, stated: object, found: int) -> DataError:
    return DataError(
        f"{manifest} belongs to another dataset than {dataset} ({stated} images, not {found}); "
        "convert the images again."
    )
