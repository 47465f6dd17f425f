"""What an unfinished conversion has done: the file `.NAME.journal` beside its target, which is also its lock.

A line per record, the head first: the CRC-32 of the rest of the line, then JSON. A line that a kill or a full
disk has cut short, and what follows it, counts for nothing.

Shape legend: N samples of a block.
"""

import base64
import errno
import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipelines.errors import DataError
from tools.convert.target import SAMPLE, write_all

_LOCKED = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # the file system has none


@dataclass(frozen=True)
class Record:
    """A block that is in the dataset's files."""

    entries: int  # of the source that are done after it
    ends_file: bool
    samples_N: np.ndarray  # SAMPLE
    left_out: list[tuple[str, str]]  # name, reason
    file: str = ""  # with start, end, sha256: the block as in the manifest; "" where nothing was written
    start: int = 0
    end: int = 0
    sha256: str = ""
    seconds: float = 0.0  # of work on the whole conversion so far
    is_flushed: bool = False  # it and all blocks before it would outlive a power cut

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"samples_N": base64.b64encode(self.samples_N.tobytes()).decode()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Record":
        """Raises `KeyError`, `TypeError` or `ValueError` for what another version has written."""
        samples_N = np.frombuffer(base64.b64decode(content["samples_N"]), SAMPLE)
        left_out = [(name, reason) for name, reason in content["left_out"]]
        return cls(**content | {"samples_N": samples_N, "left_out": left_out})


class Journal:
    """The records of one conversion. Made by `open_journal`; its methods raise `OSError`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.head: dict[str, Any] | None = None
        self.records: list[Record] = []
        self.is_foreign = False  # another version has written it; `head` and `records` are incomplete
        self._file = descriptor
        self._ends: list[int] = []  # of the lines
        with open(descriptor, "rb", closefd=False) as lines:
            try:
                for content, end in _whole_lines(lines):
                    if self.head is None:
                        self.head = dict(content)
                    else:
                        self.records.append(Record.from_json(content))
                    self._ends.append(end)
            except (KeyError, TypeError, ValueError):
                self.is_foreign = True

    def start(self, head: dict[str, Any]) -> None:
        """Forget everything; the conversion is now the one that `head` describes."""
        os.ftruncate(self._file, 0)
        self.head, self.records, self.is_foreign, self._ends = None, [], False, []
        self._append(head)
        self.head = head

    def keep(self, num_records: int) -> None:
        """Forget the records after the first so many, and a line that was cut short."""
        del self.records[num_records:]
        del self._ends[num_records + 1 :]
        os.ftruncate(self._file, self._ends[-1])

    def append(self, record: Record) -> None:
        self._append(record.as_json())
        self.records.append(record)

    def flush(self) -> None:
        """Wait until the records are on the disk."""
        os.fsync(self._file)

    def remove(self) -> None:
        """Remove the file; the lock stays until the end of the `with` block."""
        self.path.unlink(missing_ok=True)

    def _append(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        position = self._ends[-1] if self._ends else 0
        write_all(self._file, [line], position)
        self._ends.append(position + len(line))


@contextmanager
def open_journal(target: Path) -> Iterator[Journal]:
    """The journal of the conversion to `target`, for one process at a time.

    Raises `DataError` where another conversion holds it, and `OSError`.
    """
    path = target.with_name(f".{target.name}.journal")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _LOCKED:
                    raise DataError(
                        f"Another conversion to {target} is running; wait for its end or choose another "
                        "target."
                    ) from error
                if error.errno not in _NO_LOCKS:
                    raise
            # The conversion that held the lock until now may have removed the file that was opened.
            if _is_at(descriptor, path):
                yield Journal(path, descriptor)
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _whole_lines(lines: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
    """The content of each line up to the first damaged one, and the position where the line ends.

    Raises `ValueError` for an undamaged line that is not JSON.
    """
    end = 0
    for line in lines:
        checksum, _, text = line.partition(b" ")
        if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
            return
        end += len(line)
        yield json.loads(text), end
