"""What every source of images offers, and the compact table behind all of them.

Shape legend: N images.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from errno import EFBIG, ENODATA
from pathlib import Path
from typing import Protocol

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

ENTRY = np.dtype(
    [
        ("folder", "<i4"),  # position in the table of folder names
        ("label", "<i4"),
        ("archive", "<i4"),  # position in the list of archives
        ("offset", "<i8"),  # where the bytes begin in the archive, or NOT_A_FILE
        ("size", "<i8"),  # in bytes, or UNKNOWN
    ]
)
UNKNOWN = -1
NOT_A_FILE = -1
NO_LABEL = -1
MAX_BYTES = 1 << 30  # of a file; one call reads less than 2 GiB
IMAGE_ENDINGS = tuple(ending.encode() for ending in IMG_EXTENSIONS)


class ImageSet(Protocol):
    """Images of one source, in the order in which a dataset takes them."""

    description: str  # the kind of source, for people
    path: Path
    classes: list[str]  # empty where the images have no labels
    ignored: int  # files that are not named as images

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Path within the source, printable; "n01440764.tar/n01440764_10026.JPEG" inside archives."""

    def label(self, index: int) -> int:
        """Position in `classes`; -1 without labels."""

    def read(self, index: int) -> bytes:
        """The file's bytes. Any number of threads may read.

        Raises `OSError`, also for a missing label and for more than `MAX_BYTES`.
        """

    def size(self, index: int) -> int:
        """Bytes of the file; 0 where it cannot be found out, or where they are too many to be read."""

    def read_together(self, entries: range, size_N: np.ndarray, out_B: np.ndarray) -> np.ndarray:
        """Read files one after the other into `out_B`, all in one call without Python's lock.

        `size_N`: int64, the `size` of each. `out_B`: uint8, one byte longer than their sum. Returns for each
        file whether it is there, bool (N,); `read` tells what is the matter with the others.
        """

    def fingerprint(self) -> str:
        """SHA-256 over classes, names, labels and sizes: the same for a copy elsewhere."""

    def identity(self) -> str:
        """SHA-256 over where the files lie and when each was last changed: another one for a copy."""

    @property
    def archives(self) -> Sequence[Path]:
        """The archives that the images lie in; none where each is a file."""


class Names:
    """Many file names, one after the other in one piece of memory."""

    def __init__(self, terminated: bytes | bytearray) -> None:
        """`terminated`: the names, each followed by a zero byte."""
        self._bytes = bytes(terminated)
        self._ends_N = np.flatnonzero(np.frombuffer(self._bytes, np.uint8) == 0)

    def __len__(self) -> int:
        return len(self._ends_N)

    def __getitem__(self, index: int) -> bytes:
        start = int(self._ends_N[index - 1]) + 1 if index else 0
        return self._bytes[start : self._ends_N[index]]

    def take(self, indices: Iterable[int]) -> "Names":
        taken = bytearray()
        for index in indices:
            taken += self[index] + b"\0"
        return Names(taken)

    def raw(self) -> bytes:
        """All names, each followed by a zero byte."""
        return self._bytes


class ListedImages(ABC):
    """An `ImageSet` whose images are known one by one: some 70 bytes of memory for each."""

    _archives: Sequence[Path] = ()

    def __init__(
        self,
        description: str,
        path: Path,
        *,
        classes: list[str],
        folders: list[bytes],
        names: Names,
        entries_N: np.ndarray,
        ignored: int,
    ) -> None:
        """`folders`: folder names that `entries_N` (of dtype `ENTRY`) points into, without closing slash."""
        self.description = description
        self.path = path
        self.classes = [printable(name) for name in classes]
        self.ignored = ignored
        self.folders = folders
        self.names = names
        self.entries_N = entries_N

    def __len__(self) -> int:
        return len(self.entries_N)

    def name(self, index: int) -> str:
        return printable(self.raw_name(index))

    def label(self, index: int) -> int:
        return int(self.entries_N["label"][index])

    def read(self, index: int) -> bytes:
        if self.classes and self.entries_N["label"][index] == NO_LABEL:
            raise OSError(ENODATA, "the image has no label")
        if self.entries_N["size"][index] > MAX_BYTES:
            raise OSError(EFBIG, f"{self.entries_N['size'][index]} bytes are more than {MAX_BYTES}")
        return self._read(index)

    def size(self, index: int) -> int:
        size = int(self.entries_N["size"][index])
        return size if 0 <= size <= MAX_BYTES else 0

    def read_together(self, entries: range, size_N: np.ndarray, out_B: np.ndarray) -> np.ndarray:
        is_read_N = np.zeros(len(entries), bool)
        is_readable_N = size_N > 0
        if self.classes:
            is_readable_N &= self.entries_N["label"][entries.start : entries.stop] != NO_LABEL
        self._read_together(entries, size_N, is_readable_N, out_B, is_read_N)
        return is_read_N

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (
            "\0".join([self.description, *self.classes]).encode(),
            b"\0".join(self.folders),
            self.names.raw(),
        ):
            digest.update(len(part).to_bytes(8, "little") + part)
        for column in ("folder", "label", "size"):
            digest.update(np.ascontiguousarray(self.entries_N[column]).tobytes())
        return digest.hexdigest()

    @property
    def archives(self) -> Sequence[Path]:
        return self._archives

    def identity(self) -> str:
        places = [os.path.realpath(os.fsencode(path)) for path in (self.path, *self.archives)]
        digest = hashlib.sha256(b"\0".join(places))
        digest.update(self._changes().tobytes())
        return digest.hexdigest()

    def raw_name(self, index: int) -> bytes:
        """Path within the source as the file system or the archive has it."""
        folder = self.folders[self.entries_N["folder"][index]]
        return folder + b"/" + self.names[index] if folder else self.names[index]

    def keep(self, indices_N: np.ndarray) -> None:
        """Forget all other images."""
        self.names = self.names.take(indices_N)
        self.entries_N = self.entries_N[indices_N]

    def set_labels(self, classes: list[str], labels_N: np.ndarray) -> None:
        self.classes = classes
        self.entries_N["label"] = labels_N

    def _changes(self) -> array:
        """When each file that the images lie in was last changed, in ns, or UNKNOWN; of type "q"."""
        return array("q", (_changed_ns(path) for path in self.archives))

    @abstractmethod
    def _read(self, index: int) -> bytes: ...

    @abstractmethod
    def _read_together(
        self,
        entries: range,
        size_N: np.ndarray,
        is_wanted_N: np.ndarray,
        out_B: np.ndarray,
        is_read_N: np.ndarray,
    ) -> None:
        """See `compiled.read_files`."""


def _changed_ns(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # reading it will tell
        return UNKNOWN


def is_image_name(name: bytes) -> bool:
    """Whether a file of this name is an image, by the endings that torchvision's `ImageFolder` takes."""
    return name.lower().endswith(IMAGE_ENDINGS)


def printable(name: str | bytes | Path) -> str:
    """A file name as text that JSON takes; bytes that are not UTF-8 appear as backslash escapes."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")
