"""WebDataset shards: plain tar files that can be read as a stream, and DALI's index beside each.

A sample is `000001234.jpg`, the image, and `000001234.cls`, its label as text, which is not there where the
source has no labels. The number is the sample's position in the whole dataset. The index has the form that
DALI's `wds2idx` writes, version 1.2.

Shape legend: N samples.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tools.convert.target import Buffer, Written, cut, write_all

SAMPLES_PER_SHARD = 1000  # where the number of shards is not given
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)  # fields of a header
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


class ShardTarget:
    """A folder with `shard-000000.tar`, `shard-000000.idx` and so on, each of as many entries of the source.

    There are `num_shards` of them, less those whose entries are all left out.
    """

    max_sample_bytes = 1 << 30

    def __init__(self, part: Path, num_entries: int, num_shards: int) -> None:
        self.part = part
        self.bounds = tuple(num_entries * (shard + 1) // num_shards for shard in range(num_shards))
        part.mkdir(exist_ok=True)
        self._file = -1
        self._position = 0  # in the current shard
        self._shard = 0
        self._num_samples = 0
        self._index: list[str] = []  # of the current shard, a line per sample

    def append(self, samples_N: np.ndarray, pieces: list[Buffer], ends_file: bool) -> Written | None:
        path, start = self._path("tar"), self._position
        row: list[Buffer] = []
        labels, sizes = samples_N["label"].tolist(), samples_N["size"].tolist()
        images = cut(pieces, sizes)
        numbers = range(self._num_samples, self._num_samples + len(sizes))
        for number, label, size, image in zip(numbers, labels, sizes, images, strict=True):
            members = (size, image), (len(str(label)), [b"%d" % label])
            for name, (length, content) in zip(_names(number, label), members, strict=False):
                row += [_header(name, length), *content, bytes(-length % _BLOCK)]
        self._place(samples_N)
        if ends_file and self._position:
            row.append(_END)
        if row:
            if self._file < 0:
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            write_all(self._file, row, start)
        if ends_file:
            self._next_shard()
        end = start + sum(map(len, row))
        return Written(path.name, 0, row, end) if row else None

    def restore(self, samples_N: np.ndarray, ends_file: bool) -> None:
        self._place(samples_N)
        if ends_file:
            self._next_shard()

    def truncate(self) -> None:
        current = self._path("tar")
        for path in self.part.iterdir():
            if path.stem > current.stem or (path.stem == current.stem and not self._position):
                path.unlink()
        if self._position:
            os.truncate(current, self._position)

    def finish(self) -> Iterator[Written]:
        for path in sorted(self.part.glob("*.idx")):
            data = path.read_bytes()
            yield Written(path.name, 0, [data], len(data))

    def files_bytes(self, num_samples: int, image_bytes: int) -> int:
        return image_bytes + num_samples * 7 * _BLOCK // 2  # two headers, a label, half a block

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _path(self, suffix: str) -> Path:
        return self.part / f"shard-{self._shard:06}.{suffix}"

    def _place(self, samples_N: np.ndarray) -> None:
        """Take room for these samples, and note in the index where it is."""
        for size, label in zip(samples_N["size"].tolist(), samples_N["label"].tolist(), strict=True):
            parts = []
            for name, length in zip(_names(self._num_samples, label), (size, len(str(label))), strict=False):
                self._position += _BLOCK
                parts.append(f"{name.partition('.')[2]} {self._position} {length} {name}")
                self._position += length + -length % _BLOCK
            self._index.append(" ".join(parts) + "\n")
            self._num_samples += 1

    def _next_shard(self) -> None:
        """Write the shard's index and begin the next one; a shard without samples is none."""
        if not self._position:
            return
        self._path("idx").write_text(f"v1.2 {len(self._index)}\n" + "".join(self._index), encoding="ascii")
        self.close()
        self._shard, self._position, self._index = self._shard + 1, 0, []


def _names(number: int, label: int) -> list[str]:
    """The members of a sample: the image, and the label if there is one."""
    return [f"{number:09}.jpg", f"{number:09}.cls"][: 1 + (label >= 0)]


def _header(name: str, size: int) -> bytes:
    """What `TarInfo.tobuf` gives for this name and size, time and owner 0, in a tenth of its time."""
    header = bytearray(_HEADER)
    header[_NAME] = name.encode().ljust(100, b"\0")
    header[_SIZE] = b"%011o\0" % size
    header[_CHECKSUM] = b" " * 8
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)
