"""The compiled side of a copy: files read and JPEGs checked, a chunk in one call, without Python's lock.

All compiled code is in this file: numba's cache notices changes in the file of the cached function only.

Shape legend: N files, B bytes.
"""

import os

import numpy as np
from numba import njit, types

from pipelines.compiled import cached

# Columns of what `check_jpegs` finds.
FAULT, WHERE, DETAIL, HEIGHT, WIDTH, IS_PLAIN, IS_SUSPICIOUS, END = range(8)
COLUMNS = 8
# Values of FAULT. WHERE is a position, DETAIL the marker found there.
(
    NO_FAULT,
    NOT_A_JPEG,
    NO_END,
    NO_MARKER,
    WRONG_MARKER,
    CUT_HEADERS,
    WRONG_FRAME,
    WRONG_HUFFMAN,
    WRONG_QUANTISATION,
    NO_FRAME,
    NO_PIXELS,
    NO_SIZE,
) = range(12)

_SOI, _EOI, _SOS, _DQT, _DHT, _APP0, _APP14 = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xE0, 0xEE
_FRAMES = {*range(0xC0, 0xD0)} - {_DHT, 0xC8, 0xCC}
_SEGMENTS = _FRAMES | {_SOS, _DQT, _DHT, 0xCC, 0xDC, 0xDD, 0xFE, *range(_APP0, _APP0 + 16)}
_IS_FRAME = np.isin(np.arange(256), list(_FRAMES))
_IS_SEGMENT = np.isin(np.arange(256), list(_SEGMENTS))
_JFIF, _ADOBE = tuple(b"JFIF\0"), tuple(b"Adobe")
_PROGRESSIVE = 0xC2  # this frame and those below are Huffman coded
# Bits for the tables 0 to 3 of each kind.
_QUANTISATION_TABLE, _DC_TABLE, _AC_TABLE = 1 << 0, 1 << 4, 1 << 8
_NO_TABLE = 12  # the number of a bit that is never set
_MAX_DC_SYMBOL = 16  # bits of a difference
_ZEROS = 64  # in coded pixels, only a flat area or a lost block of the file has so many in a row

_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # not waiting for the other end of a pipe

# Of the C library; addresses as integers.
_open = types.ExternalFunction("open", types.int32(types.intp, types.int32))
_close = types.ExternalFunction("close", types.int32(types.int32))
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.intp, types.intp, types.int64))


@cached
def read_files(
    paths: np.ndarray, size: np.ndarray, is_wanted: np.ndarray, out: np.ndarray, is_read: np.ndarray
) -> None:
    """Read files one after the other into `out`, each to where the sizes before it add up.

    paths      (B,) uint8: each ends with a zero byte
    size       (N,) int64: bytes of each file
    is_wanted  (N,) bool: whether to read it
    out        (sum of `size` + 1,) uint8
    is_read    (N,) bool: false; becomes true where the file could be read and has just that size
    """
    path = start = 0
    for i in range(len(size)):
        if is_wanted[i]:
            file = _open(paths.ctypes.data + path, _OPEN_FLAGS)
            if file >= 0:
                # One byte more, which the next file overwrites: has it grown?
                is_read[i] = _pread(file, out.ctypes.data + start, size[i] + 1, 0) == size[i]
                _close(file)
        start += size[i]
        while paths[path]:
            path += 1
        path += 1


@cached
def read_parts(
    file: int,
    offset: np.ndarray,
    size: np.ndarray,
    is_wanted: np.ndarray,
    out: np.ndarray,
    is_read: np.ndarray,
) -> None:
    """Read parts of an open file one after the other into `out`, each to where the sizes before it add up.

    file       a descriptor
    offset     (N,) int64: where each part begins
    size       (N,) int64: its bytes
    is_wanted  (N,) bool: whether to read it
    out        (sum of `size`,) uint8
    is_read    (N,) bool: false; becomes true where all of it could be read
    """
    start = 0
    for i in range(len(size)):
        if is_wanted[i]:
            is_read[i] = _pread(file, out.ctypes.data + start, size[i], offset[i]) == size[i]
        start += size[i]


@cached
def check_jpegs(data: np.ndarray, size: np.ndarray, is_wanted: np.ndarray, found: np.ndarray) -> None:
    """`jpeg.read_layout` of the files that lie one after the other in `data`.

    data       (B,) uint8
    size       (N,) int64: bytes of each file
    is_wanted  (N,) bool: which to check
    found      (N, COLUMNS) int64: zeros; END and the flags mean nothing where FAULT is not NO_FAULT
    """
    start = 0
    for i in range(len(size)):
        if is_wanted[i]:
            _check(data[start : start + size[i]], found[i])
        start += size[i]


@njit(nogil=True)
def _check(data: np.ndarray, found: np.ndarray) -> None:
    """Of one file: data (B,), found (COLUMNS,)."""
    end = len(data)
    frame = first_scan = tables = 0
    transform, has_jfif, has_tables = -1, False, True
    if end < 2 or data[0] != 0xFF or data[1] != _SOI:
        found[FAULT] = NOT_A_JPEG
        return
    position = 2
    while True:
        marker_end = position + 1
        while marker_end < end and data[position] == 0xFF and data[marker_end] == 0xFF:  # fill bytes
            marker_end += 1
        if marker_end >= end:
            found[FAULT] = NO_END
            return
        if data[position] != 0xFF:
            found[FAULT], found[WHERE] = NO_MARKER, position
            return
        marker, position = data[marker_end], marker_end + 1
        if marker == _EOI:
            break
        if not _IS_SEGMENT[marker]:
            found[FAULT], found[WHERE], found[DETAIL] = WRONG_MARKER, position - 2, marker
            return
        length = _number(data, position) if position + 2 <= end else 0
        if length < 2 or position + length > end:
            found[FAULT] = CUT_HEADERS
            return
        segment = data[position + 2 : position + length]
        if _IS_FRAME[marker]:
            if frame or len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
                found[FAULT] = WRONG_FRAME
                return
            frame = position + 2
            found[HEIGHT], found[WIDTH] = _number(segment, 1), _number(segment, 3)
            found[DETAIL] = marker
        elif marker == _DHT:
            defined = _huffman_tables(segment)
            if defined < 0:
                found[FAULT] = WRONG_HUFFMAN
                return
            tables |= defined
        elif marker == _DQT:
            defined = _quantisation_tables(segment)
            if defined < 0:
                found[FAULT] = WRONG_QUANTISATION
                return
            tables |= defined
        elif marker == _APP0:
            has_jfif = has_jfif or _starts_with(segment, _JFIF)
        elif marker == _APP14 and len(segment) >= 12 and _starts_with(segment, _ADOBE):
            transform = segment[11]
        position += length
        if marker == _SOS:
            if not frame:
                found[FAULT] = NO_FRAME
                return
            is_progressive = found[DETAIL] == _PROGRESSIVE
            has_tables = has_tables and _has_tables(segment, data[frame:], is_progressive, tables)
            first_scan = first_scan or position
            position = _next_marker(data, position)
            if position < 0:
                found[FAULT] = NO_END
                return
    if not first_scan:
        found[FAULT] = NO_PIXELS
        return
    if not found[HEIGHT] or not found[WIDTH]:
        found[FAULT] = NO_SIZE
        return
    is_huffman_coded = found[DETAIL] <= _PROGRESSIVE
    found[IS_PLAIN] = is_huffman_coded and data[frame] == 8 and _is_usual(data[frame:], transform, has_jfif)
    found[IS_SUSPICIOUS] = not has_tables or _has_zeros(data[first_scan:position])
    found[END] = position


@njit(nogil=True)
def _number(data: np.ndarray, position: int) -> int:
    return np.int64(data[position]) << 8 | np.int64(data[position + 1])


@njit(nogil=True)
def _starts_with(segment: np.ndarray, start: tuple[int, ...]) -> bool:
    is_equal = len(segment) >= len(start)
    for i in range(len(start)):
        is_equal = is_equal and segment[i] == start[i]
    return is_equal


@njit(nogil=True)
def _next_marker(data: np.ndarray, start: int) -> int:
    """Position of the next marker that does not belong to coded pixels, or -1.

    Stuffing (00), fill bytes (FF) and restarts (D0 to D7) do. LLVM makes SIMD code of the loop over 64 bytes:
    its indices are unsigned, so that numba does not guard them.
    """
    one, width, end = np.uint64(1), np.uint64(64), np.uint64(len(data))
    position = np.uint64(start)
    while position + width < end:
        seen = np.uint8(0)
        for i in range(position, position + width):
            code = data[i + one]
            seen |= (data[i] == 0xFF) & (code != 0) & (code != 0xFF) & ((code & 0xF8) != 0xD0)
        if seen:
            break
        position += width
    while position + one < end:
        code = data[position + one]
        if data[position] == 0xFF and code != 0 and code != 0xFF and code & 0xF8 != 0xD0:
            return np.int64(position)
        position += one
    return -1


@njit(nogil=True)
def _has_zeros(data: np.ndarray) -> bool:
    """Whether there are `_ZEROS` zero bytes in a row: every such row has a byte that is looked at."""
    for probe in range(_ZEROS - 1, len(data), _ZEROS):
        if data[probe] == 0:
            first = last = probe
            while first > 0 and data[first - 1] == 0:
                first -= 1
            while last + 1 < len(data) and data[last + 1] == 0:
                last += 1
            if last - first + 1 >= _ZEROS:
                return True
    return False


@njit(nogil=True)
def _huffman_tables(segment: np.ndarray) -> int:
    """Bits of the tables that a segment defines, or -1."""
    start = tables = 0
    while start < len(segment):
        if start + 17 > len(segment) or segment[start] & 0xEC:
            return -1
        total = room = 0
        for i in range(16):
            count = np.int64(segment[start + 1 + i])
            total += count
            room += count << (15 - i)
        # Kraft's inequality: no more codes of each length than there is room for.
        if start + 17 + total > len(segment) or total > 256 or room > 1 << 16:
            return -1
        is_dc = segment[start] < 16
        if is_dc:
            for i in range(start + 17, start + 17 + total):
                if segment[i] > _MAX_DC_SYMBOL:
                    return -1
        tables |= (_DC_TABLE if is_dc else _AC_TABLE) << np.int64(segment[start] & 3)
        start += 17 + total
    return tables


@njit(nogil=True)
def _quantisation_tables(segment: np.ndarray) -> int:
    """Bits of the tables that a segment defines, or -1."""
    start = tables = 0
    while start < len(segment):
        size = 65 if segment[start] < 16 else 129
        if start + size > len(segment) or segment[start] & 0xEC:
            return -1
        tables |= _QUANTISATION_TABLE << np.int64(segment[start] & 3)
        start += size
    return tables


@njit(nogil=True)
def _has_tables(scan: np.ndarray, frame: np.ndarray, is_progressive: bool, tables: int) -> bool:
    """Whether the frame header has the components of a scan header, and `tables` those that they need."""
    count = np.int64(scan[0]) if len(scan) else 0
    if not 1 <= count <= 4 or len(scan) != 4 + 2 * count:
        return False
    is_first, is_refined = scan[1 + 2 * count] == 0, scan[3 + 2 * count] >= 16
    for i in range(count):
        component, chosen = scan[1 + 2 * i], scan[2 + 2 * i]
        needed = 0
        for j in range(np.int64(frame[5])):
            if frame[6 + 3 * j] == component:
                needed = _QUANTISATION_TABLE << min(np.int64(frame[8 + 3 * j]), _NO_TABLE)
        if not needed or chosen >= 64 or chosen & 15 >= 4:
            return False
        if not is_progressive or (is_first and not is_refined):
            needed |= _DC_TABLE << np.int64(chosen >> 4)
        if not is_progressive or not is_first:
            needed |= _AC_TABLE << np.int64(chosen & 15)
        if needed & ~tables:
            return False
    return True


@njit(nogil=True)
def _is_usual(frame: np.ndarray, transform: int, has_jfif: bool) -> bool:
    """Whether the components of a frame header are grayscale, or YCbCr with a usual sampling."""
    if frame[5] == 1:
        return True
    if frame[5] != 3:
        return False
    # As libjpeg decides: JFIF is YCbCr, else Adobe's marker tells, else the components' names.
    is_rgb = frame[6] == 0x52 and frame[9] == 0x47 and frame[12] == 0x42
    is_ycc = has_jfif or (transform == 1 if transform >= 0 else not is_rgb)
    # Sampling factors, horizontal and vertical: of luminance those with a name, such as 4:2:0 for 2, 2.
    factors = frame[7]
    is_named = factors == 0x11 or factors == 0x21 or factors == 0x12 or factors == 0x22 or factors == 0x41
    return is_ycc and is_named and frame[10] == 0x11 and frame[13] == 0x11
