"""FFCV's dataset format, version 2, written as the images come.

    header | a descriptor per field | metadata, a record per sample | images | allocation table

little-endian, as in ffcv/types.py and ffcv/fields of FFCV 1.0.2. FFCV reads the file in pages: no image may
cross a multiple of the page size. The metadata get room for every entry of the source; `num_samples` in the
header says how many of them there are.

Shape legend: N samples.
"""

import os
from pathlib import Path

import numpy as np

from pipelines.source import BETON_ALLOCATION, BETON_FIELD, BETON_HEADER, BETON_IMAGE, BETON_VERSION
from tools.convert.target import Buffer, Written, cut, write_all

MIN_PAGE_SIZE = 1 << 23  # FFCV's default

FIELDS = (("image", 2), ("label", 1))  # RGBImageField, IntField
# FFCV aligns the label. As a field, the gap is copied; as a gap, it would hold whatever was in memory.
METADATA = np.dtype([("image", BETON_IMAGE), ("gap", "u1", 3), ("label", "<i8")])


class BetonTarget:
    """A `.beton` file with the fields `image` (JPEG, or raw RGB) and `label`; samples without label get 0.

    `max_side`: the longest side of an image, in pixels.
    """

    def __init__(self, part: Path, num_entries: int, max_side: int) -> None:
        self.part = part
        self.bounds = (num_entries,)
        # Even noise at quality 100 stays below 3 bytes per pixel.
        self.max_sample_bytes = max(MIN_PAGE_SIZE, 1 << (3 * max_side**2 - 1).bit_length())
        self._file = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        self._head_size = (
            BETON_HEADER.itemsize + len(FIELDS) * BETON_FIELD.itemsize + num_entries * METADATA.itemsize
        )
        self._position = self._head_size
        self._metadata: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []

    def append(self, samples_N: np.ndarray, pieces: list[Buffer], ends_file: bool) -> Written | None:
        if not len(samples_N):
            return None
        start = self._position
        starts_N, size_N = np.array(self._place(samples_N)), samples_N["size"].astype(np.int64)
        gap_N = np.diff(starts_N, prepend=start) - np.append(0, size_N[:-1])
        runs = np.append(0, np.flatnonzero(gap_N[1:]) + 1)  # of images without gaps between them
        row: list[Buffer] = []
        images = cut(pieces, np.add.reduceat(size_N, runs).tolist())
        for gap, run in zip(gap_N[runs].tolist(), images, strict=True):
            row += [bytes(gap), *run]
        write_all(self._file, row, start)
        return Written(self.part.name, start, row, self._position)

    def restore(self, samples_N: np.ndarray, ends_file: bool) -> None:
        self._place(samples_N)

    def truncate(self) -> None:
        os.ftruncate(self._file, self._position)

    def finish(self) -> list[Written]:
        """Write the allocation table, then the head: until then the file is of no known format."""
        metadata_N = np.concatenate(self._metadata)
        table_N = np.zeros(len(metadata_N), BETON_ALLOCATION)
        table_N["sample_id"] = np.arange(len(table_N))
        table_N["ptr"] = metadata_N["image"]["data_ptr"]
        table_N["size"] = np.concatenate(self._sizes)
        header = np.array(
            (BETON_VERSION, len(FIELDS), self.max_sample_bytes, len(metadata_N), self._position), BETON_HEADER
        )
        fields = np.zeros(len(FIELDS), BETON_FIELD)
        for field, (name, type_id) in zip(fields, FIELDS, strict=True):
            field["name"], field["type_id"] = name, type_id
        head = header.tobytes() + fields.tobytes() + metadata_N.tobytes()
        parts = ((self._position, table_N.tobytes()), (0, head.ljust(self._head_size, b"\0")))
        for start, data in parts:
            write_all(self._file, [data], start)
        return [Written(self.part.name, start, [data], start + len(data)) for start, data in parts]

    def files_bytes(self, num_samples: int, image_bytes: int) -> int:
        tails = 1 + image_bytes / max(num_samples, 1) / 2 / self.max_sample_bytes  # of the pages
        return int(image_bytes * tails) + num_samples * (METADATA.itemsize + BETON_ALLOCATION.itemsize)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _place(self, samples_N: np.ndarray) -> list[int]:
        """Take room for these samples; returns where each image starts."""
        position, page_size, starts = self._position, self.max_sample_bytes, []
        for size in samples_N["size"].tolist():
            if position % page_size + size > page_size:
                position += -position % page_size
            starts.append(position)
            position += size
        self._position = position
        metadata_N = np.zeros(len(samples_N), METADATA)
        metadata_N["image"]["mode"] = samples_N["is_raw"]
        metadata_N["image"]["width"] = samples_N["width"]
        metadata_N["image"]["height"] = samples_N["height"]
        metadata_N["image"]["data_ptr"] = starts
        metadata_N["label"] = np.maximum(samples_N["label"], 0)
        self._metadata.append(metadata_N)
        self._sizes.append(samples_N["size"])
        return starts
