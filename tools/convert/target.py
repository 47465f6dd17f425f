"""What writes a dataset's files, whatever their format.

A dataset grows by blocks of samples. The bytes of a block depend on nothing but the samples so far, and a
target takes note of blocks that an earlier run has written by their samples' table alone: so a conversion
that was killed goes on where it stopped and ends with the same bytes.

Shape legend: N samples of a block.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

_MOST_PIECES = os.sysconf("SC_IOV_MAX")  # in one call

Buffer = bytes | memoryview  # of bytes

SAMPLE = np.dtype(
    [
        ("is_raw", "u1"),
        ("was_copied", "u1"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("label", "<i4"),  # -1: no label
        ("size", "<u4"),  # bytes of the encoded image
    ]
)


class Written(NamedTuple):
    """Bytes that were added to a file, and where the checksum over them starts."""

    file: str
    start: int
    pieces: list[Buffer]  # in a row; joining them would cost as much as writing them
    end: int

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return sum(map(len, self.pieces))


class Target(Protocol):
    """Writes the files of one dataset under temporary names. Its methods raise `OSError`."""

    part: Path  # the file or folder under its temporary name
    bounds: tuple[int, ...]  # a block must end after so many entries of the source
    max_sample_bytes: int

    def append(self, samples_N: np.ndarray, pieces: list[Buffer], ends_file: bool) -> Written | None:
        """Write a block: `SAMPLE` records and the images. None where nothing was to be written.

        `pieces`: the images in a row, in pieces of any sizes. `ends_file`: the entries so far are one of
        `bounds`.
        """

    def restore(self, samples_N: np.ndarray, ends_file: bool) -> None:
        """Take note of a block that is in the files already."""

    def truncate(self) -> None:
        """Remove from the files what is beyond the blocks so far."""

    def finish(self) -> list[Written]:
        """Write what is left once all samples are there."""

    def files_bytes(self, num_samples: int, image_bytes: int) -> int:
        """About how much room so many samples take, whose images sum up to `image_bytes`."""

    def close(self) -> None:
        """Close files. May be called at any time, and again."""


def cut(pieces: Iterable[Buffer], sizes: Iterable[int]) -> Iterator[list[Buffer]]:
    """`pieces`, taken as one row of bytes, cut anew after so many bytes each; nothing is copied."""
    left = deque(memoryview(piece) for piece in pieces)
    for size in sizes:
        taken: list[Buffer] = []
        while size:
            piece = left.popleft()
            if len(piece) > size:
                left.appendleft(piece[size:])
                piece = piece[:size]
            taken.append(piece)
            size -= len(piece)
        yield taken


def write_all(descriptor: int, pieces: Iterable[Buffer], offset: int) -> None:
    """`os.pwritev` until everything is written. Raises `OSError`, also where the disk takes only a part."""
    left = deque(memoryview(piece) for piece in pieces if piece)
    while left:
        written = os.pwritev(descriptor, list(islice(left, _MOST_PIECES)), offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.popleft())
        if written:
            left[0] = left[0][written:]
