"""Where the files lie in a tar archive, from its headers alone, many times as fast as `tarfile`.

Format: POSIX.1-1988 (ustar) and POSIX.1-2001 (pax), "pax - portable archive interchange", and the GNU
extensions for long names and large sizes.
"""

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from pipelines.errors import DataError

BLOCK = 512
_ADLER_MODULUS = 65521
MAX_EXTENSION = 1 << 20  # bytes of one extended header; a longer one is damage
MAX_DIGITS = 20  # of a number in one; as many as 64 bits have
_ZERO_BLOCK = bytes(BLOCK)
_EXTENSIONS = frozenset((b"L", b"K", b"x", b"g"))  # their content belongs to the next member, or to all
_FILES = frozenset((b"0", b"\0", b"7"))
_WITHOUT_CONTENT = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))  # links, devices, folders


class Member(NamedTuple):
    """A file in an archive."""

    path: bytes  # without leading "./"
    offset: int
    size: int
    is_file: bool  # False for a link or a device


def members(descriptor: int, archive: str, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The members of the archive in bytes `start` to `end` of an open file, but for its folders.

    Raises `DataError`, which names `archive`, where the bytes are no archive, or a damaged or incomplete one.
    """
    end = os.fstat(descriptor).st_size if end is None else end
    position, long_path, long_size = start, None, None
    while position < end:
        header = os.pread(descriptor, BLOCK, position)
        if len(header) < BLOCK:
            raise _incomplete(archive)
        if header == _ZERO_BLOCK:  # the end of the archive
            return
        offset = position + BLOCK
        try:
            if not _has_right_sum(header):
                raise ValueError
            size = _number(header[124:136])
            if size < 0:
                raise ValueError
        except ValueError:
            what = "is not a tar archive" if position == start else "is damaged"
            raise DataError(f"{archive} {what} (at byte {position}); download or copy it again.") from None
        kind = header[156:157]
        is_extension = kind in _EXTENSIONS
        if long_size is not None and not is_extension:
            size = long_size
        if kind in _WITHOUT_CONTENT:
            size = 0
        position = offset + -(-size // BLOCK) * BLOCK
        if offset + size > end:
            raise _incomplete(archive)
        if is_extension:
            if size > MAX_EXTENSION:
                raise DataError(f"{archive} has a damaged header (at byte {offset}); download it again.")
            content = os.pread(descriptor, size, offset)
            if kind == b"L":
                long_path = content.partition(b"\0")[0]
            elif kind == b"x":
                records = _pax_records(content, archive)
                if b"path" in records:
                    long_path = records[b"path"].partition(b"\0")[0]
                long_size = _decimal(records[b"size"], archive) if b"size" in records else None
            continue
        path = _short_path(header) if long_path is None else long_path
        long_path = long_size = None
        if kind != b"5" and not path.endswith(b"/"):
            yield Member(path.removeprefix(b"./").lstrip(b"/"), offset, size, kind in _FILES)


def _has_right_sum(header: bytes) -> bool:
    """Whether the header's bytes have the sum that it states, in which the sum itself counts as 8 blanks."""
    stated = header[148:156]
    # Adler-32's low half is one more than the sum of all bytes, and quicker than `sum`.
    total = zlib.adler32(header) & 0xFFFF
    return (_number(stated) + sum(stated) - 8 * ord(" ") + 1) % _ADLER_MODULUS == total


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: the remaining bits are the number itself
        return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _short_path(header: bytes) -> bytes:
    path = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        return prefix + b"/" + path if prefix else path
    return path


def _pax_records(content: bytes, archive: str) -> dict[bytes, bytes]:
    records = {}
    while content:
        digits, blank, _ = content.partition(b" ")
        length = _decimal(digits, archive)
        if not blank or not 0 < length <= len(content):
            raise _damaged_extension(archive)
        key, _, value = content[len(digits) + 1 : length - 1].partition(b"=")
        records[key] = value
        content = content[length:]
    return records


def _decimal(digits: bytes, archive: str) -> int:
    if not digits.isdigit() or len(digits) > MAX_DIGITS:
        raise _damaged_extension(archive)
    return int(digits)


def _damaged_extension(archive: str) -> DataError:
    return DataError(f"{archive} has a damaged extended header; download or copy it again.")


def _incomplete(archive: str) -> DataError:
    return DataError(f"{archive} is cut short; download or copy it again.")
