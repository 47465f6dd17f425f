"""FFCV's .beton files, version 2; little-endian:

    header | a descriptor per field | metadata, a record per sample | pages of image bytes | allocation table

where the allocation table, at the very end, gives (sample, offset, size) of every stored image. A conversion
that was interrupted or a file that was copied incompletely lacks the end, so everything is checked against
the file's size before a loader touches it.

Shape legend: N samples of the source, K samples that are asked for, F fields, A entries of the allocation
table, H, W height and width in pixels.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.errors import DataError
from pipelines.source.base import MAX_LABEL, Source, read_manifest, wrong_number_of_images

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
_MODE_RAW = 1  # 0: JPEG


class BetonSource(Source):
    """A .beton file with the fields `image` (JPEG or raw) and `label`; the file is mapped, not read.

    Class names come from the manifest `x.manifest.json` beside `x.beton` where there is one.

    A file that is deleted or replaced by another stays readable. One that is made shorter while it is mapped
    does not: the system ends a process that touches what is no longer there (SIGBUS). So `stored`, `pixels`
    and `encoded` look at its present length first, and raise `DataError`; what is left is the time between
    that and the touch: a moment, and with DALI the few batches that it is fed ahead.
    """

    def __init__(self, path: Path) -> None:
        """Raises `DataError` for anything that is not a whole .beton file; `OSError`.

        1. Map the file; header and descriptors.
        2. Metadata.
        3. Allocation table: the bytes of each image.
        4. Sizes and labels.
        """
        self.path = path
        with path.open("rb") as file:  # 1
            length = path.stat().st_size  # nothing cannot be mapped
            self._map = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ) if length else b""
        self.file = np.frombuffer(self._map, np.uint8)  # the whole file
        header = self._read(BETON_HEADER, 0, 1)[0]
        if header["version"] != BETON_VERSION or int(header["page_size"]).bit_count() != 1:
            raise DataError(
                f"{path} is not a .beton file of version {BETON_VERSION}; convert the images again."
            )
        fields_F = self._read(BETON_FIELD, BETON_HEADER.itemsize, int(header["num_fields"]))

        image, label, record = self._layout(fields_F)  # 2
        metadata_start = BETON_HEADER.itemsize + fields_F.nbytes
        metadata_N = self._read(record, metadata_start, int(header["num_samples"]))
        if not len(metadata_N):
            raise DataError(f"{path} holds no samples; convert the images again.")
        images_N = metadata_N[image]

        data_start, table_start = metadata_start + metadata_N.nbytes, int(header["alloc_table_ptr"])  # 3
        if table_start < data_start:  # the writer fills it in last
            raise self._cut_short()
        num_entries, rest = divmod(max(0, len(self.file) - table_start), BETON_ALLOCATION.itemsize)
        if not num_entries or rest:
            raise self._cut_short()
        size_N = self._sizes_in_table(
            self._read(BETON_ALLOCATION, table_start, num_entries), images_N["data_ptr"]
        )
        self._start_N = images_N["data_ptr"].astype(np.int64)
        end_N = self._start_N + size_N
        is_inside = self._start_N.min() >= data_start and end_N.max() <= table_start
        if not is_inside or (end_N <= self._start_N).any():  # a size of 2^63 or more wraps around
            raise self._cut_short()
        self.num_bytes_N = size_N  # what each image takes in the file

        self._heights_N = images_N["height"].astype(np.int32)  # 4
        self._widths_N = images_N["width"].astype(np.int32)
        self.is_raw_N = images_N["mode"] == _MODE_RAW
        self.holds_raw = bool(self.is_raw_N.any())
        if min(self._heights_N.min(), self._widths_N.min()) < 1:
            raise DataError(f"{path} is damaged: it holds an image without pixels; convert the images again.")
        is_as_long = size_N == 3 * self._heights_N.astype(np.int64) * self._widths_N
        if images_N["mode"].max() > _MODE_RAW or not is_as_long[self.is_raw_N].all():
            raise DataError(f"{path} is damaged: raw images are not of their size; convert the images again.")
        self.labels_N = metadata_N[label].astype(np.int64)
        if self.labels_N.min() < 0 or self.labels_N.max() > MAX_LABEL:
            raise DataError(f"{path} has labels outside 0 to {MAX_LABEL}; convert the images again.")
        self.classes = self._class_names()

    def __len__(self) -> int:
        return len(self.labels_N)

    def sizes(self, indices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._heights_N[indices_K], self._widths_N[indices_K]

    def stored(self, indices_K: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of each sample: where its bytes start in `file` and how many they are (int64), height and width
        (int32), and whether they are raw pixels (bool).

        Raises `DataError` where the file has become shorter since it was opened.
        """
        self._check_length()
        columns = self._start_N, self.num_bytes_N, self._heights_N, self._widths_N, self.is_raw_N
        return tuple(column_N[indices_K] for column_N in columns)

    def pixels(self, index: int) -> np.ndarray | None:
        if not self.is_raw_N[index]:
            return None
        return self._bytes(index).reshape(self._heights_N[index], self._widths_N[index], 3)

    def encoded(self, index: int) -> np.ndarray:
        if self.is_raw_N[index]:
            raise DataError(
                f"The {self.name(index)} is stored as raw pixels; convert the images again as JPEG."
            )
        return self._bytes(index)

    def extents(self, indices_K: np.ndarray) -> Iterator[tuple[Path, int, int]]:
        starts_and_sizes = zip(self._start_N[indices_K], self.num_bytes_N[indices_K], strict=True)
        return ((self.path, int(start), int(size)) for start, size in starts_and_sizes)

    def name(self, index: int) -> str:
        return f"sample {index} of {self.path}"

    def _bytes(self, index: int) -> np.ndarray:
        self._check_length()
        start = self._start_N[index]
        return self.file[start : start + self.num_bytes_N[index]]

    def _check_length(self) -> None:
        if self._map.size() < len(self.file):
            raise self._cut_short()

    def _read(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        if offset + count * dtype.itemsize > len(self.file):
            raise self._cut_short()
        return np.frombuffer(self.file, dtype, count, offset)

    def _layout(self, fields_F: np.ndarray) -> tuple[str, str, np.dtype]:
        """The metadata's names of the image and the label, and the metadata's dtype."""
        names = [name.decode("ascii", "replace") for name in fields_F["name"].tolist()]
        types = dict(zip(names, fields_F["type_id"].tolist(), strict=True))
        for name, kind, wanted in (("image", "RGBImageField", _IMAGE_TYPE), ("label", "IntField", _INT_TYPE)):
            if types.get(name) != wanted:
                found = ", ".join(types)
                raise DataError(
                    f"{self.path} has no field '{name}' of type {kind} (its fields: {found}); "
                    "convert the images again."
                )
        if len(types) != len(names) or not set(types.values()) <= _METADATA_OF_TYPE.keys():
            raise DataError(
                f"{self.path} has fields of an unknown type or of one name; convert the images again."
            )
        columns = [(f"f{place}", _METADATA_OF_TYPE[kind]) for place, kind in enumerate(types.values())]
        return f"f{names.index('image')}", f"f{names.index('label')}", np.dtype(columns, align=True)

    def _sizes_in_table(self, table_A: np.ndarray, ptr_N: np.ndarray) -> np.ndarray:
        """int64 bytes of the images that start at `ptr_N`.

        Raises `DataError` where the table is not that of these samples.
        """
        order_A = np.argsort(table_A["ptr"])
        place_N = np.searchsorted(table_A["ptr"], ptr_N, sorter=order_A)
        if place_N.max() >= len(table_A) or table_A["sample_id"].max() >= len(ptr_N):
            raise self._cut_short()
        entries_N = table_A[order_A[place_N]]
        if (entries_N["ptr"] != ptr_N).any() or (entries_N["sample_id"] != np.arange(len(ptr_N))).any():
            raise self._cut_short()
        return entries_N["size"].astype(np.int64)

    def _cut_short(self) -> DataError:
        return DataError(f"{self.path} is cut short or damaged; copy it again or convert the images again.")

    def _class_names(self) -> list[str]:
        num_classes = int(self.labels_N.max()) + 1
        manifest = self.path.with_suffix(".manifest.json")
        if not manifest.exists():
            return [str(label) for label in range(num_classes)]
        content = read_manifest(manifest)
        classes, images = content["classes"], content.get("images", len(self))
        if images != len(self):
            raise wrong_number_of_images(manifest, self.path, images, len(self))
        if not classes and content.get("unlabelled") is True:
            return []
        if len(classes) < num_classes:
            raise DataError(
                f"{manifest} names too few classes for the labels in {self.path} ({num_classes} needed); "
                f"convert the images again."
            )
        return [str(name) for name in classes]
