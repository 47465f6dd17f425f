"""Whether a JPEG file is whole, from its structure: a hundredth of the time that decoding takes.

Source: ITU-T T.81 (JPEG), annex B, for markers and segments; Adobe technical note 5116 for the colour
transform. What decoders take is narrower, and `JpegLayout.is_plain` says whether all of them take this one.
"""

from typing import NamedTuple

import numpy as np

from pipelines.threads import keep_torch_threads

START = b"\xff\xd8"
_SOI, _EOI, _SOS, _DQT, _DHT, _APP0, _APP14 = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xE0, 0xEE
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_FRAMES = {*range(0xC0, 0xD0)} - {_DHT, 0xC8, 0xCC}
_SEGMENTS = _FRAMES | {_SOS, _DQT, _DHT, 0xCC, 0xDC, 0xDD, 0xFE, *range(_APP0, _APP0 + 16)}
# Sampling factors (horizontal, vertical) of luminance with 1 x 1 for both colours: those with a name, such as
# 4:2:0 for (2, 2).
_SAMPLINGS = {(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)}
_ZEROS = bytes(64)  # in coded pixels, only a flat area or a lost block of the file has so many


class DamagedJpegError(Exception):
    """The file is not what its structure promises; the text says why."""


class JpegLayout(NamedTuple):
    """What the structure tells."""

    height: int
    width: int
    is_plain: bool  # Huffman coded, 8 bit, grayscale or YCbCr with usual sampling: every decoder takes it
    end: int  # bytes, with the end marker; a file may go on after it
    is_suspicious: bool  # may have lost a block of the file; decoding tells


def read_layout(data: bytes) -> JpegLayout:
    """Walk through the segments and scans of a file that begins with `START`, up to its end marker.

    Raises `DamagedJpegError` where the file ends before, or where segments, tables, the frame's size or
    markers amid coded pixels cannot be right. Bits that changed without that are found only by decoding.
    """
    frame: tuple[int, int, int, bytes] | None = None
    transform, has_jfif, first_scan = None, False, 0
    markers: list[int] = []
    position = 2
    while True:
        marker, position = _marker_at(data, position)
        if marker == _EOI:
            break
        if marker not in _SEGMENTS:
            raise DamagedJpegError(f"damaged: marker {marker:02X} at byte {position - 2}")
        length = int.from_bytes(data[position : position + 2], "big")
        segment = data[position + 2 : position + length]
        if length < 2 or len(segment) < length - 2:
            raise DamagedJpegError("truncated amid its headers")
        position += length
        if marker in _FRAMES:
            if frame is not None or len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
                raise DamagedJpegError("damaged: a wrong frame header")
            frame = marker, int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big"), segment
        elif marker == _DHT:
            _check_huffman(segment)
        elif marker == _DQT:
            _check_quantisation(segment)
        elif marker == _APP0:
            has_jfif = has_jfif or segment[:5] == b"JFIF\0"
        elif marker == _APP14 and segment[:5] == b"Adobe" and len(segment) >= 12:
            transform = segment[11]
        elif marker == _SOS:
            if frame is None:
                raise DamagedJpegError("damaged: pixels before the frame header")
            if not first_scan:
                first_scan = position
                markers = _markers_from(data, position)
            while markers and markers[-1] < position:
                markers.pop()
            if not markers:
                raise DamagedJpegError("truncated: no end marker")
            position = markers[-1]
    if frame is None or not first_scan:
        raise DamagedJpegError("damaged: no pixels before the end marker")
    kind, height, width, segment = frame
    if not height or not width:
        raise DamagedJpegError(f"damaged: {width} x {height} pixels")
    is_plain = kind in _HUFFMAN_FRAMES and segment[0] == 8 and _is_usual(segment, transform, has_jfif)
    is_suspicious = data.find(_ZEROS, first_scan, position) >= 0
    return JpegLayout(height, width, is_plain, position, is_suspicious)


def decodes_cleanly(data: bytes, height: int, width: int) -> bool:
    """Whether libjpeg-turbo decodes a plain JPEG of this size without as much as a warning."""
    with keep_torch_threads():
        from ffcv.libffcv import imdecode

    encoded, pixels_HWC = np.frombuffer(data, np.uint8), np.empty((height, width, 3), np.uint8)
    return imdecode(encoded, pixels_HWC, height, width, height, width, 0, 0, 1, 1, False, False) == 0


def _marker_at(data: bytes, position: int) -> tuple[int, int]:
    """The marker that must be at `position`, perhaps after fill bytes, and where it ends."""
    end = position + 1
    while data[position : position + 1] == b"\xff" and data[end : end + 1] == b"\xff":
        end += 1
    if end >= len(data):
        raise DamagedJpegError("truncated: no end marker")
    if data[position] != 0xFF:
        raise DamagedJpegError(f"damaged: no marker at byte {position}")
    return data[end], end + 1


def _markers_from(data: bytes, start: int) -> list[int]:
    """Positions of all markers after `start`, last first, but for those that belong to coded pixels."""
    bytes_ = np.frombuffer(data, np.uint8, offset=start)
    ff = np.flatnonzero(bytes_[:-1] == 0xFF)
    code = bytes_[ff + 1]
    is_marker = (code != 0) & (code != 0xFF) & ((code < 0xD0) | (code > 0xD7))  # stuffing, fill, restarts
    return (ff[is_marker][::-1] + start).tolist()


def _check_huffman(segment: bytes) -> None:
    while segment:
        counts = segment[1:17]
        total = sum(counts)
        # Kraft's inequality: no more codes of each length than there is room for.
        room = sum(count << (15 - i) for i, count in enumerate(counts))
        if len(segment) < 17 + total or total > 256 or room > 1 << 16 or segment[0] & 0xEC:
            raise DamagedJpegError("damaged: a wrong Huffman table")
        segment = segment[17 + total :]


def _check_quantisation(segment: bytes) -> None:
    while segment:
        size = 65 if segment[0] < 16 else 129
        if len(segment) < size or segment[0] & 0xEC:
            raise DamagedJpegError("damaged: a wrong quantisation table")
        segment = segment[size:]


def _is_usual(frame: bytes, transform: int | None, has_jfif: bool) -> bool:
    """Whether the components of a frame header are grayscale, or YCbCr with a usual sampling."""
    components = [frame[i : i + 3] for i in range(6, len(frame), 3)]
    if len(components) == 1:
        return True
    if len(components) != 3:
        return False
    # As libjpeg decides: JFIF is YCbCr, else Adobe's marker tells, else the components' names.
    names = bytes(component[0] for component in components)
    is_ycc = has_jfif or (transform == 1 if transform is not None else names != b"RGB")
    factors = [divmod(component[1], 16) for component in components]
    return is_ycc and factors[0] in _SAMPLINGS and factors[1:] == [(1, 1), (1, 1)]
