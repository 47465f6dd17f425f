"""WebDataset shards as `fastbarlow convert` writes them: a manifest, and tar files with an index beside each.

The index is DALI's, version 1.2: a line per sample with type, offset, size and name of the image, and of its
label if there is one.

Shape legend: N samples of the source, K samples that are asked for, G groups.
"""

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.errors import DataError
from pipelines.order import WINDOW
from pipelines.source.base import Source, read_manifest, unreadable, wrong_number_of_images
from pipelines.source.folder import is_image_name
from pipelines.source.header import START_BYTES, jpeg_size, stored_size

# Of images that lie in a row. To read as much takes about as long as a disk's or a network's pause before.
GROUP_BYTES = 4 << 20
_MANIFEST = "manifest.json"
_UNKNOWN = -1


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds tar files or their manifest, and neither images nor folders."""
    found = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() or is_image_name(entry.name):
                return False
            found = found or entry.name == _MANIFEST or entry.name.endswith(".tar")
    return found


class ShardSource(Source):
    """The images in a folder of shards.

    Opening reads the manifest and the indices alone; labels and sizes are read when they are asked for, from
    beside and from the start of the image. Files are opened for each read: there may be more of them than a
    process may keep open or mapped, and one that is cut short meanwhile is an error, not the process's end.
    """

    def __init__(self, path: Path) -> None:
        """Raises `DataError` where a file is missing or not as long as the manifest says, or an index does
        not match its tar file; `OSError`.
        """
        self.path = path
        manifest = path / _MANIFEST
        if not manifest.exists():
            raise DataError(
                f"{path} holds tar files without {_MANIFEST}; run `fastbarlow convert {path} train.beton`, "
                "or give a folder name in place of train.beton for shards, and train on the result."
            )
        content = read_manifest(manifest)
        self.classes = [str(name) for name in content["classes"]]
        indices = [_read_index(tar, bool(self.classes)) for tar in _tar_files(path, content)]
        num_samples = sum(len(index.start_N) for index in indices)
        if not num_samples or num_samples != content.get("images"):
            raise wrong_number_of_images(manifest, path, content.get("images"), num_samples)

        self._tars = [index.path for index in indices]
        self._start_N, self._num_bytes_N, self._label_start_N, self._label_bytes_N = (
            np.concatenate([getattr(index, column) for index in indices]) for column in _Index._fields[1:]
        )
        self._shard_N = np.repeat(np.arange(len(indices)), [len(index.start_N) for index in indices])
        self._labels_N = np.full(num_samples, _UNKNOWN if self.classes else 0, np.int64)
        self._sizes_N2 = np.zeros((num_samples, 2), np.int32)  # 0: not read yet
        # Groups: what begins in the same GROUP_BYTES of the same shard.
        place_N = self._start_N // GROUP_BYTES
        is_first_N = np.r_[True, (np.diff(place_N) != 0) | (np.diff(self._shard_N) != 0)]
        self._first_G = np.flatnonzero(is_first_N)
        self.group_sizes_G = np.diff(self._first_G, append=num_samples)
        self._asked: dict[int, None] = {}  # groups that the storage was asked for, the latest last

    def __len__(self) -> int:
        return len(self._start_N)

    @property
    def labels_N(self) -> np.ndarray:  # noqa: N802 (the name of an attribute)
        return self.labels(np.arange(len(self)))

    def labels(self, indices_K: np.ndarray) -> np.ndarray:
        unknown = indices_K[self._labels_N[indices_K] == _UNKNOWN]
        for index, text in self._read(unknown, self._label_start_N, self._label_bytes_N):
            label = int(text) if text.isdigit() and len(text) < 8 else len(self.classes)
            if label >= len(self.classes):
                raise DataError(
                    f"The {self.name(index)} has no label from 0 to {len(self.classes) - 1} beside it; "
                    "copy the shards again."
                )
            self._labels_N[index] = label
        return self._labels_N[indices_K]

    def sizes(self, indices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        unknown = indices_K[self._sizes_N2[indices_K, 0] == 0]
        for index, start in self._read(unknown, self._start_N, np.minimum(self._num_bytes_N, START_BYTES)):
            self._sizes_N2[index] = jpeg_size(start) or self._size_in_whole_file(index)
        heights_K, widths_K = self._sizes_N2[indices_K].T
        return heights_K, widths_K

    def encoded(self, index: int) -> np.ndarray:
        with self._opened(index) as descriptor:
            data = self._piece(descriptor, index, self._start_N, self._num_bytes_N)
        return np.frombuffer(data, np.uint8)

    def extents(self, indices_K: np.ndarray) -> Iterator[tuple[Path, int, int]]:
        for index in indices_K:
            yield self._tars[self._shard_N[index]], int(self._start_N[index]), int(self._num_bytes_N[index])

    def name(self, index: int) -> str:
        return f"sample {index} of {self._tars[self._shard_N[index]]}"

    def read_ahead(self, indices_K: np.ndarray) -> None:
        groups_K = np.searchsorted(self._first_G, indices_K, side="right") - 1
        for group in np.unique(groups_K).tolist():
            if group in self._asked:
                continue
            self._asked[group] = None
            if len(self._asked) > 2 * WINDOW:  # the window that is read and the next one
                del self._asked[next(iter(self._asked))]
            first, last = self._first_G[group], self._first_G[group] + self.group_sizes_G[group] - 1
            start = int(self._start_N[first])
            length = int(self._start_N[last] + self._num_bytes_N[last]) - start
            # A file that is gone is for those to tell who read it.
            with suppress(DataError), self._opened(int(first)) as descriptor:
                os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def _read(
        self, indices_K: np.ndarray, start_N: np.ndarray, num_bytes_N: np.ndarray
    ) -> Iterator[tuple[int, bytes]]:
        """Each sample and its bytes there, shard by shard. Raises `DataError` where they cannot be read."""
        shard_K = self._shard_N[indices_K]
        order_K = np.argsort(shard_K, kind="stable")
        edges = np.flatnonzero(np.diff(shard_K[order_K])) + 1
        for of_shard in np.split(indices_K[order_K], edges) if len(indices_K) else ():
            with self._opened(of_shard[0]) as descriptor:
                for index in of_shard.tolist():
                    yield index, self._piece(descriptor, index, start_N, num_bytes_N)

    def _piece(self, descriptor: int, index: int, start_N: np.ndarray, num_bytes_N: np.ndarray) -> bytes:
        length = int(num_bytes_N[index])
        data = os.pread(descriptor, length, int(start_N[index]))
        if len(data) < length:
            raise DataError(
                f"The {self.name(index)} cannot be read, as the file was cut short; copy the shards again."
            )
        return data

    @contextmanager
    def _opened(self, index: int) -> Iterator[int]:
        """The descriptor of the tar file with this sample. Raises `DataError`, also for errors inside."""
        try:
            descriptor = os.open(self._tars[self._shard_N[index]], os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise unreadable(self.name(index), error) from error

    def _size_in_whole_file(self, index: int) -> tuple[int, int]:
        encoded = self.encoded(index)
        try:
            return stored_size(encoded)
        except Exception as error:  # Pillow's format plug-ins raise many kinds for damaged files
            raise unreadable(self.name(index), error) from error


class _Index(NamedTuple):
    """Where the images of a tar file and their labels lie; int64, in bytes."""

    path: Path  # of the tar file
    start_N: np.ndarray
    num_bytes_N: np.ndarray
    label_start_N: np.ndarray
    label_bytes_N: np.ndarray


def _tar_files(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """The tar files that the manifest lists. Raises `DataError` where a file has another length."""
    try:
        stated = {str(file["file"]): int(file["bytes"]) for file in manifest["files"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / _MANIFEST} does not list the files of shards; convert the images again."
        ) from error
    for name, num_bytes in stated.items():
        file = folder / name
        try:
            found = file.stat().st_size
        except FileNotFoundError as error:
            raise DataError(f"The file {file} is missing; copy the shards again.") from error
        if found != num_bytes:
            raise DataError(f"{file} has {found} bytes, not {num_bytes}; copy the shards again.")
    return [folder / name for name in sorted(stated) if name.endswith(".tar")]


def _read_index(tar: Path, is_labelled: bool) -> _Index:
    """Raises `DataError` where the index beside a tar file is none, or does not match it."""
    path = tar.with_suffix(".idx")
    try:
        version, count, *words = path.read_bytes().split()
        num_samples, parts = int(count), (b"jpg", b"cls")[: 1 + is_labelled]
        step = 4 * len(parts)  # words in a line
        kinds = [set(words[place::step]) for place in range(0, step, 4)]
        if version != b"v1.2" or len(words) != step * num_samples or kinds != [{part} for part in parts]:
            raise ValueError("another format")
        columns = [
            np.fromiter(map(int, words[place + column :: step]), np.int64, num_samples)
            for place in range(0, step, 4)
            for column in (1, 2)
        ]
        starts, sizes = np.stack(columns[::2], axis=1), np.stack(columns[1::2], axis=1)
        edges = np.stack((starts, starts + sizes), axis=2).ravel()
        is_inside = edges[0] >= 0 and edges[-1] <= tar.stat().st_size and (np.diff(edges) >= 0).all()
        if not is_inside or (starts % tarfile.BLOCKSIZE).any():
            raise ValueError("other places")
    except (ValueError, OverflowError, FileNotFoundError) as error:
        raise DataError(
            f"{path} is not an index that belongs to {tar.name}; copy or convert the shards again."
        ) from error
    nothing_N = np.zeros(num_samples, np.int64)
    return _Index(tar, *columns, *[nothing_N] * (4 - len(columns)))
