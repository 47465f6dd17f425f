"""Where the samples live: the labels, image sizes and encoded bytes of a folder or of a .beton file.

A .beton file (FFCV's format, version 2; little-endian) is

    header | a descriptor per field | metadata, a record per sample | pages of image bytes | allocation table

where the allocation table, at the very end, gives (sample, offset, size) of every stored image. A conversion
that was interrupted or a file that was copied incompletely lacks the end, so everything is checked against
the file's size before a loader touches it.
"""

import json
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from pipelines.errors import DataError

BETON_VERSION = 2
BETON_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
BETON_FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
BETON_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
BETON_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_FLOAT_TYPE, _INT_TYPE, _IMAGE_TYPE = 0, 1, 2
_METADATA_OF_TYPE = {
    _FLOAT_TYPE: np.dtype("<f8"),
    _INT_TYPE: np.dtype("<i8"),
    _IMAGE_TYPE: BETON_IMAGE,
    3: _BYTES,
    4: np.dtype("<u8"),
    5: _BYTES,
    6: np.dtype("<u8"),
}
_MODE_JPEG, _MODE_RAW = 0, 1
_MAX_LABEL = 1 << 20


class Source(Protocol):
    """A set of labelled images with random access."""

    path: Path
    classes: list[str]  # empty where there are no labels
    labels_N: np.ndarray  # int64; all 0 without labels

    def __len__(self) -> int: ...

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 heights and widths in pixels, as stored (an EXIF orientation is not applied)."""

    def pixels(self, index: int) -> np.ndarray | None:
        """uint8 (height, width, 3), RGB, of an image that is stored as raw pixels; None for a file."""

    def encoded(self, index: int) -> np.ndarray:
        """uint8: the bytes of the image file. Raises `DataError` where it is stored as raw pixels."""

    def name(self, index: int) -> str:
        """The sample's name for messages."""


def open_source(path: Path) -> Source:
    """The source at `path`: a .beton file or a folder with one sub-folder per class.

    Raises `DataError` where `path` is missing, unreadable or neither of the two, or the file is damaged.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return FolderSource(path)
        if not path.exists():
            raise DataError(f"There is no dataset at {path}; check data.path.")
        if path.suffix != ".beton":
            raise DataError(f"{path} is neither a folder nor a .beton file; set data.path to one of these.")
        return BetonSource(path)
    except OSError as error:
        raise DataError(
            f"The dataset {path} cannot be read ({error.strerror}); check data.path and its permissions."
        ) from error


def decode_rgb(file: Path | BinaryIO, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The RGB image in a file of any mode; a JPEG at reduced scale if that has `at_least` (width, height).

    Raises what Pillow raises, and `ValueError` for 32-bit pixels.
    """
    with Image.open(file) as image:
        if at_least is not None:
            image.draft(None, at_least)
        if image.mode.startswith("I;16"):
            # Pillow would clip 16-bit values at 255 instead of scaling them.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode}: 32-bit pixels have no fixed range")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def read_image(source: Source, index: int) -> Image.Image:
    """The decoded RGB image. Raises `DataError` that names the sample where it cannot be decoded."""
    pixels_HW3 = source.pixels(index)
    if pixels_HW3 is not None:
        return Image.fromarray(pixels_HW3)
    encoded = source.encoded(index)
    try:
        return decode_rgb(BytesIO(encoded))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(source.name(index), error) from error


class FolderSource:
    """Images in one sub-folder per class, in the order of torchvision's `ImageFolder`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not any(path.iterdir()):
            raise DataError(f"The folder {path} is empty; put one sub-folder of images per class into it.")
        try:
            self.classes, class_to_index = find_classes(path)
        except FileNotFoundError as error:
            raise DataError(
                f"The folder {path} has no class sub-folders; put the images into one sub-folder per class."
            ) from error
        samples = make_dataset(path, class_to_index, IMG_EXTENSIONS, allow_empty=True)
        self._files = [file for file, _ in samples]
        self.labels_N = np.array([label for _, label in samples], dtype=np.int64)
        counts_C = np.bincount(self.labels_N, minlength=len(self.classes))
        if not counts_C.all():
            folder = path / self.classes[int(counts_C.argmin())]
            raise DataError(f"The class folder {folder} holds no images; remove it or put images into it.")
        self._sizes_N2 = np.zeros((len(samples), 2), dtype=np.int32)  # 0: header not read yet

    def __len__(self) -> int:
        return len(self._files)

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for index in indices[self._sizes_N2[indices, 0] == 0]:
            try:
                with Image.open(self._files[index]) as image:
                    self._sizes_N2[index] = image.height, image.width
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise _unreadable(self.name(index), error) from error
        heights_N, widths_N = self._sizes_N2[indices].T
        return heights_N, widths_N

    def pixels(self, index: int) -> None:
        return None

    def encoded(self, index: int) -> np.ndarray:
        try:
            return np.fromfile(self._files[index], dtype=np.uint8)
        except OSError as error:
            raise _unreadable(self.name(index), error) from error

    def name(self, index: int) -> str:
        return self._files[index]


class BetonSource:
    """A .beton file with the fields `image` (JPEG or raw) and `label`; the file is mapped, not read.

    Class names come from the manifest `x.manifest.json` beside `x.beton` where there is one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = np.empty(0, np.uint8)
        if path.stat().st_size:
            self._file = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)

        header = self._read(BETON_HEADER, 0, 1)[0]
        page_size = int(header["page_size"])
        if header["version"] != BETON_VERSION or page_size.bit_count() != 1:
            raise DataError(
                f"{path} is not a .beton file of version {BETON_VERSION}; convert the images again."
            )
        fields = self._read(BETON_FIELD, BETON_HEADER.itemsize, int(header["num_fields"]))
        types = {field["name"].decode("ascii", "replace"): int(field["type_id"]) for field in fields}
        for name, kind, wanted in (("image", "RGBImageField", _IMAGE_TYPE), ("label", "IntField", _INT_TYPE)):
            if types.get(name) != wanted:
                found = ", ".join(types)
                raise DataError(
                    f"{path} has no field '{name}' of type {kind} (its fields: {found}); "
                    "convert the images again."
                )
        self.fields = tuple(types)
        if not set(types.values()) <= _METADATA_OF_TYPE.keys():
            raise DataError(f"{path} has fields of an unknown type; convert the images again.")

        record = np.dtype([(name, _METADATA_OF_TYPE[kind]) for name, kind in types.items()], align=True)
        metadata_start = BETON_HEADER.itemsize + fields.nbytes
        metadata = self._read(record, metadata_start, int(header["num_samples"]))
        table_start = int(header["alloc_table_ptr"])
        if not len(metadata):
            raise DataError(f"{path} holds no samples; convert the images again.")
        data_start = metadata_start + metadata.nbytes
        if table_start < data_start:  # the writer fills it in last
            raise self._cut_short()
        table = self._read(
            BETON_ALLOCATION, table_start, max(0, len(self._file) - table_start) // BETON_ALLOCATION.itemsize
        )

        images = metadata["image"]
        order = np.argsort(table["ptr"])
        place = np.searchsorted(table["ptr"], images["data_ptr"], sorter=order)
        if not len(order) or place.max() >= len(order):
            raise self._cut_short()
        table = table[order[place]]
        self._start_N = images["data_ptr"].astype(np.int64)
        self._end_N = self._start_N + table["size"].astype(np.int64)
        is_inside = self._start_N.min() >= data_start and self._end_N.max() <= table_start
        is_inside &= (self._end_N > self._start_N).all()  # not where a size of 2^63 or more wraps around
        if (table["ptr"] != images["data_ptr"]).any() or not is_inside:
            raise self._cut_short()
        self._heights_N = images["height"].astype(np.int32)
        self._widths_N = images["width"].astype(np.int32)
        self.is_raw_N = images["mode"] == _MODE_RAW
        self.labels_N = metadata["label"].astype(np.int64)
        if min(self._heights_N.min(), self._widths_N.min()) < 1:
            raise DataError(f"{path} is damaged: it holds an image without pixels; convert the images again.")
        self.num_bytes_N = self._end_N - self._start_N  # what each image takes in the file
        is_as_long = self.num_bytes_N == 3 * self._heights_N.astype(np.int64) * self._widths_N
        if images["mode"].max() > _MODE_RAW or not is_as_long[self.is_raw_N].all():
            raise DataError(f"{path} is damaged: raw images are not of their size; convert the images again.")
        if self.labels_N.min() < 0 or self.labels_N.max() > _MAX_LABEL:
            raise DataError(f"{path} has labels outside 0 to {_MAX_LABEL}; convert the images again.")
        self.classes = self._class_names()

    def __len__(self) -> int:
        return len(self.labels_N)

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._heights_N[indices], self._widths_N[indices]

    @property
    def holds_raw(self) -> bool:
        """Whether some images are stored as raw pixels."""
        return bool(self.is_raw_N.any())

    def pixels(self, index: int) -> np.ndarray | None:
        if not self.is_raw_N[index]:
            return None
        pixels = self._file[self._start_N[index] : self._end_N[index]]
        return pixels.reshape(self._heights_N[index], self._widths_N[index], 3)

    def encoded(self, index: int) -> np.ndarray:
        if self.is_raw_N[index]:
            raise DataError(
                f"The {self.name(index)} is stored as raw pixels; convert the images again as JPEG."
            )
        return self._file[self._start_N[index] : self._end_N[index]]

    def name(self, index: int) -> str:
        return f"sample {index} of {self.path}"

    def _read(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        if offset + count * dtype.itemsize > len(self._file):
            raise self._cut_short()
        return np.frombuffer(self._file, dtype, count, offset)

    def _cut_short(self) -> DataError:
        return DataError(f"{self.path} is cut short or damaged; copy it again or convert the images again.")

    def _class_names(self) -> list[str]:
        num_classes = int(self.labels_N.max()) + 1
        manifest = self.path.with_suffix(".manifest.json")
        if not manifest.exists():
            return [str(label) for label in range(num_classes)]
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            classes, images = content["classes"], content.get("images", len(self))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{manifest} is not a manifest with a list 'classes'; convert again or remove it."
            ) from error
        if images != len(self):
            raise DataError(
                f"{manifest} belongs to another dataset than {self.path} ({images} images, not {len(self)}); "
                "convert the images again."
            )
        if classes == [] and content.get("unlabelled") is True:
            return []
        if not isinstance(classes, list) or len(classes) < num_classes:
            raise DataError(
                f"{manifest} names too few classes for the labels in {self.path} ({num_classes} needed); "
                f"convert the images again."
            )
        return [str(name) for name in classes]


def _unreadable(name: str, error: Exception) -> DataError:
    if isinstance(error, UnidentifiedImageError):
        reason = "no known image format"
    else:
        reason = getattr(error, "strerror", None) or str(error)
    return DataError(f"The image {name} cannot be read ({reason}); remove it or convert the images again.")
