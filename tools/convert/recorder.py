"""Checksums of what is written, and its records in the journal, on a thread beside the conversion."""

import hashlib
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from tools.convert.journal import Journal, Record
from tools.convert.manifest import manifest_path
from tools.convert.target import Written

FLUSH_BYTES = 256 << 20  # of unflushed data: what a power cut may cost
MAX_PENDING = 2  # blocks in memory that wait for their checksum
_CHUNK = 1 << 20


class RunningChecksum:
    """SHA-256 over bytes of a file from some start on, taken up again where the next block continues it.

    `root`: the dataset's file, or the folder of its files. Its methods return hexadecimal digests.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._run = ("", 0)
        self._end = 0
        self._sha256 = hashlib.sha256()

    def add(self, written: Written) -> str:
        """With bytes that were just written."""
        begin = written.end - written.size
        self._continue(written.file, written.start, begin)
        if self._end < begin:  # what an earlier conversion has written
            self.read(written.file, written.start, begin)
        for piece in written.pieces:
            self._sha256.update(piece)
        self._end = written.end
        return self._sha256.hexdigest()

    def read(self, file: str, start: int, end: int) -> str:
        """Over `start` to `end` as they are in the file; a file that is shorter ends there.

        Raises `OSError`.
        """
        self._continue(file, start, end)
        with path_of(self._root, file).open("rb") as stream:
            stream.seek(self._end)
            while self._end < end and (chunk := stream.read(min(_CHUNK, end - self._end))):
                self._sha256.update(chunk)
                self._end += len(chunk)
        return self._sha256.hexdigest()

    def _continue(self, file: str, start: int, end: int) -> None:
        if self._run != (file, start) or self._end > end:
            self._run, self._end, self._sha256 = (file, start), start, hashlib.sha256()


class Recorder:
    """Takes the blocks of a conversion in order; each is in the journal when it is in the dataset's files."""

    def __init__(self, journal: Journal, root: Path, checksum: RunningChecksum) -> None:
        self._journal = journal
        self._root = root
        self._checksum = checksum
        self._unflushed: dict[str, int] = {}  # bytes by file
        self._earlier_s = journal.records[-1].seconds if journal.records else 0.0
        self._start_s = time.monotonic()
        self._is_broken = False
        self._pending: deque[Future] = deque()
        self._thread = ThreadPoolExecutor(1, "recorder")

    @property
    def seconds(self) -> float:
        """Time that the conversion has taken, over all its runs."""
        return self._earlier_s + time.monotonic() - self._start_s

    def put(self, record: Record, written: Written | None) -> None:
        """Complete and journal the record of a block, soon. Raises `OSError`, also for an earlier block."""
        while len(self._pending) >= MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._record, record, written))

    def wait(self) -> None:
        """Until all blocks are recorded. Raises `OSError`."""
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def _record(self, record: Record, written: Written | None) -> None:
        if self._is_broken:  # a later record would leave a gap
            return
        self._is_broken = True
        if written is not None:
            place = {"file": written.file, "start": written.start, "end": written.end}
            record = replace(record, sha256=self._checksum.add(written), **place)
            self._unflushed[written.file] = self._unflushed.get(written.file, 0) + written.size
        is_flushed = sum(self._unflushed.values()) >= FLUSH_BYTES
        if is_flushed:
            flush(*(path_of(self._root, file) for file in self._unflushed), self._root, self._root.parent)
            self._unflushed.clear()
        self._journal.append(replace(record, seconds=self.seconds, is_flushed=is_flushed))
        if is_flushed:
            self._journal.flush()
        self._is_broken = False


def intact_records(journal: Journal, root: Path, checksum: RunningChecksum) -> int:
    """How many of the journal's records the files under `root` bear out.

    What was flushed is taken for good if the files are long enough; what came after it, which a power cut may
    have lost, is read again, with `checksum`.
    """
    records = journal.records
    ends: dict[str, int] = {}
    for record in records:
        ends[record.file] = max(ends.get(record.file, 0), record.end)
    try:
        if any(path_of(root, file).stat().st_size < end for file, end in ends.items() if file):
            return 0
        flushed = max((i for i, record in enumerate(records) if record.is_flushed), default=0)
        if manifest_path(root).exists():  # `publish` was under way: this may be an older dataset
            flushed = 0
        for i, record in enumerate(records[flushed:], flushed):
            if record.file and checksum.read(record.file, record.start, record.end) != record.sha256:
                return 0 if i == flushed else i
    except OSError:
        return 0
    return len(records)


def path_of(root: Path, file: str) -> Path:
    """The file of a dataset whose only file, or whose folder, is `root`."""
    return root / file if root.is_dir() else root


def flush(*paths: Path) -> None:
    """Wait until files, or the lists of names of folders, are on the disk. Raises `OSError`."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
