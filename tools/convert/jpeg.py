"""Whether JPEG files are whole, from their structure: a hundredth of the time that decoding takes.

Source: ITU-T T.81 (JPEG), annex B, for markers and segments; Adobe technical note 5116 for the colour
transform. What decoders take is narrower, and `JpegLayout.is_plain` says whether all of them take this one.

Shape legend: N files, B bytes.
"""

from typing import NamedTuple

import numpy as np

from pipelines.threads import keep_torch_threads
from tools.convert import compiled

START = b"\xff\xd8"
_TEXTS = {
    compiled.NOT_A_JPEG: "not a JPEG",
    compiled.NO_END: "truncated: no end marker",
    compiled.NO_MARKER: "damaged: no marker at byte {where}",
    compiled.WRONG_MARKER: "damaged: marker {detail:02X} at byte {where}",
    compiled.CUT_HEADERS: "truncated amid its headers",
    compiled.WRONG_FRAME: "damaged: a wrong frame header",
    compiled.WRONG_HUFFMAN: "damaged: a wrong Huffman table",
    compiled.WRONG_QUANTISATION: "damaged: a wrong quantisation table",
    compiled.NO_FRAME: "damaged: pixels before the frame header",
    compiled.NO_PIXELS: "damaged: no pixels before the end marker",
    compiled.NO_SIZE: "damaged: {width} x {height} pixels",
}


class DamagedJpegError(Exception):
    """The file is not what its structure promises; the text says why."""


class JpegLayout(NamedTuple):
    """What the structure tells."""

    height: int
    width: int
    is_plain: bool  # Huffman coded, 8 bit, grayscale or YCbCr with usual sampling: every decoder takes it
    end: int  # bytes, with the end marker; a file may go on after it
    is_suspicious: bool  # may have lost a block of the file, or lacks a table; decoding tells


class JpegLayouts(NamedTuple):
    """The layouts of many files. Fields as in `JpegLayout`."""

    is_whole_N: np.ndarray  # bool: a JPEG without faults; the other fields mean nothing for the others
    height_N: np.ndarray
    width_N: np.ndarray
    is_plain_N: np.ndarray
    end_N: np.ndarray
    is_suspicious_N: np.ndarray


def read_layout(data: bytes) -> JpegLayout:
    """Walk through the segments and scans of a JPEG file, up to its end marker.

    Raises `DamagedJpegError` where the file ends before, or where segments, tables, the frame's size or
    markers amid coded pixels cannot be right. Bits that changed without that are found only by decoding.
    """
    (found,) = _check(np.frombuffer(bytearray(data), np.uint8), np.array([len(data)]), np.array([True]))
    values = found.tolist()
    height, width = values[compiled.HEIGHT], values[compiled.WIDTH]
    if values[compiled.FAULT]:
        where, detail = values[compiled.WHERE], values[compiled.DETAIL]
        text = _TEXTS[values[compiled.FAULT]]
        raise DamagedJpegError(text.format(where=where, detail=detail, height=height, width=width))
    is_plain, is_suspicious = bool(values[compiled.IS_PLAIN]), bool(values[compiled.IS_SUSPICIOUS])
    return JpegLayout(height, width, is_plain, values[compiled.END], is_suspicious)


def read_layouts(data_B: np.ndarray, size_N: np.ndarray, is_wanted_N: np.ndarray) -> JpegLayouts:
    """`read_layout` of those files that are wanted, without Python's lock.

    `data_B`: uint8, the files one after the other. `size_N`: int64. `is_wanted_N`: bool.
    """
    found_NC = _check(data_B, size_N, is_wanted_N)
    return JpegLayouts(
        is_wanted_N & (found_NC[:, compiled.FAULT] == compiled.NO_FAULT),
        found_NC[:, compiled.HEIGHT],
        found_NC[:, compiled.WIDTH],
        found_NC[:, compiled.IS_PLAIN] != 0,
        found_NC[:, compiled.END],
        found_NC[:, compiled.IS_SUSPICIOUS] != 0,
    )


def decodes_cleanly(data: bytes, height: int, width: int) -> bool:
    """Whether libjpeg-turbo decodes a plain JPEG of this size without as much as a warning."""
    with keep_torch_threads():
        from ffcv.libffcv import imdecode

    encoded, pixels_HWC = np.frombuffer(data, np.uint8), np.empty((height, width, 3), np.uint8)
    return imdecode(encoded, pixels_HWC, height, width, height, width, 0, 0, 1, 1, False, False) == 0


def _check(data_B: np.ndarray, size_N: np.ndarray, is_wanted_N: np.ndarray) -> np.ndarray:
    found_NC = np.zeros((len(size_N), compiled.COLUMNS), np.int64)
    compiled.check_jpegs(data_B, size_N, is_wanted_N, found_NC)
    return found_NC
