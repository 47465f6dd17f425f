"""PIL's bicubic resize of a crop, bit for bit, compiled by numba: several times as fast as PIL.

The arithmetic is that of Pillow's `libImaging/Resample.c`. Along each axis an output pixel is a weighted sum
of the input pixels around it; a crop's pixels only, and more of them the more it shrinks, against aliasing.
The weights are computed in float64 and rounded to whole numbers with 22 bits after the binary point. The sums
are rounded to 8 bits after each of the two passes; a pass that keeps the size is left out.

The horizontal pass comes first; since Pillow 13 the vertical one does where that is less work, which changes
the pixels. This module does as the Pillow that is installed.

What makes it fast: both passes add up whole lines, so that LLVM turns the loops over a line into SIMD code.
For the horizontal pass the lines are columns, for which some rows at a time are transposed, and back.
Nothing here may be compiled with fastmath.

Shape legend: H, W height and width; S output size in pixels; T room for the weights of an output pixel.
Other images are flat and come with their pitch: the number of bytes from a row to the next.
"""

import math

import numpy as np
from numba import njit
from PIL import Image

BITS = 22  # of the weights, after the binary point
HALF = np.uint32(1 << (BITS - 1))
A = -0.5  # the bicubic filter's parameter
SUPPORT = 2.0  # of the filter to either side, in pixels
ROWS_AT_ONCE = 128  # transposed together: long lines, yet all in the second-level cache for usual widths

i4, u4, index = np.int32, np.uint32, np.uint64


def _pil_chooses_the_order() -> bool:
    """Whether PIL shrinks a tall image vertically first; its pixels tell, not its version."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 12), dtype=np.uint8))
    vertical_first = noise.resize((12, 8), Image.BICUBIC).resize((8, 8), Image.BICUBIC)
    return noise.resize((8, 8), Image.BICUBIC).tobytes() == vertical_first.tobytes()


CHOOSES_ORDER = _pil_chooses_the_order()


@njit(nogil=True, error_model="numpy")
def crop_and_resize(pixels_HW3: np.ndarray, box: tuple[int, int, int, int], out_SS3: np.ndarray) -> None:
    """Resize the `box` (top, left, height, width) of an image; both arrays are C-contiguous uint8.

    The box must lie inside the image and hold at least one pixel; this is not checked.
    """
    top, left, height, width = box
    size = out_SS3.shape[0]
    pitch, line = 3 * pixels_HW3.shape[1], 3 * size
    pixels, out = pixels_HW3.reshape(-1)[top * pitch + 3 * left :], out_SS3.reshape(-1)
    if height == size and width == size:
        for y in range(size):
            _copy(pixels[y * pitch :], out[y * line :][:line])
    elif height == size:
        _resize_rows(pixels, pitch, height, width, size, out)
    elif width == size:
        _resize_columns(pixels, pitch, height, line, size, out)
    elif CHOOSES_ORDER and height > size and 2 * width < height + size:
        between = np.empty(size * 3 * width, np.uint8)
        _resize_columns(pixels, pitch, height, 3 * width, size, between)
        _resize_rows(between, 3 * width, size, width, size, out)
    else:
        between = np.empty(height * line, np.uint8)
        _resize_rows(pixels, pitch, height, width, size, between)
        _resize_columns(between, line, height, line, size, out)


@njit(nogil=True, error_model="numpy")
def _copy(source: np.ndarray, target: np.ndarray) -> None:
    for i in range(target.size):
        target[i] = source[i]


@njit(nogil=True, error_model="numpy")
def _resize_rows(
    source: np.ndarray, pitch: int, height: int, width: int, size: int, target: np.ndarray
) -> None:
    """The horizontal pass: pixels (height, width) to (height, S), without gaps."""
    first_S, weights_ST, taps = _weights(width, size)
    columns = np.empty(3 * ROWS_AT_ONCE * width, np.uint8)
    resized = np.empty(3 * ROWS_AT_ONCE * size, np.uint8)
    sums = np.empty(3 * ROWS_AT_ONCE, np.uint32)
    for y in range(0, height, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, height - y)
        _transpose(source[y * pitch :], pitch, rows, width, columns)
        _filter(columns, 3 * rows, width, first_S, weights_ST, taps, sums[: 3 * rows], resized)
        _transpose(resized, 3 * rows, size, rows, target[y * 3 * size :])


@njit(nogil=True, error_model="numpy")
def _resize_columns(
    source: np.ndarray, pitch: int, height: int, line: int, size: int, target: np.ndarray
) -> None:
    """The vertical pass: rows of `line` bytes, `height` of them, to S, without gaps."""
    first_S, weights_ST, taps = _weights(height, size)
    _filter(source, pitch, height, first_S, weights_ST, taps, np.empty(line, np.uint32), target)


@njit(nogil=True, error_model="numpy")
def _weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """For a line of `length` pixels that becomes `size` long: what each output pixel is the sum of.

    Returns its first input pixel, int64 (S,), the weights from there on, uint32 (S, T), negative ones as
    their two's complement, and how many of these are not 0 at most. The steps of the arithmetic are Pillow's.
    """
    scale = length / size
    stretch = max(scale, 1.0)  # of the filter
    support = SUPPORT * stretch
    first_S = np.empty(size, np.int64)
    weights_ST = np.zeros((size, 2 * math.ceil(support) + 2), np.uint32)
    exact_T = np.empty(weights_ST.shape[1])
    most = 0
    for s in range(size):
        center = (s + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        taps = min(int(center + support + 0.5), length) - first
        total = 0.0
        for t in range(taps):
            exact_T[t] = _bicubic((t + first - center + 0.5) * (1.0 / stretch))
            total += exact_T[t]
        for t in range(taps):
            weight = exact_T[t] / total if total != 0.0 else exact_T[t]
            half = 0.5 if weight >= 0.0 else -0.5
            weights_ST[s, t] = u4(int(half + weight * (1 << BITS)))
        first_S[s] = first
        most = max(most, taps)
    return first_S, weights_ST, most


@njit(nogil=True, error_model="numpy")
def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    if x < SUPPORT:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * A
    return 0.0


@njit(nogil=True, error_model="numpy")
def _transpose(source: np.ndarray, pitch: int, rows: int, columns: int, target: np.ndarray) -> None:
    """Pixels (rows, columns), whose rows start `pitch` bytes apart, to (columns, rows) without gaps."""
    one, two, three = index(1), index(2), index(3)
    to = index(0)
    for x in range(index(columns)):
        at = three * x
        for _ in range(index(rows)):
            target[to] = source[at]
            target[to + one] = source[at + one]
            target[to + two] = source[at + two]
            at += index(pitch)
            to += three


@njit(nogil=True, error_model="numpy")
def _filter(
    source: np.ndarray,
    pitch: int,
    length: int,
    first_S: np.ndarray,
    weights_ST: np.ndarray,
    taps: int,
    sums: np.ndarray,
    target: np.ndarray,
) -> None:
    """`length` lines as long as `sums` become S, without gaps: sums of `taps` weighted ones, at least 4.

    Beyond the last line the weights are 0.
    """
    last = length - 1
    for s in range(first_S.size):
        i, weights_T = first_S[s], weights_ST[s]
        _sum_four(
            source[min(i, last) * pitch :],
            source[min(i + 1, last) * pitch :],
            source[min(i + 2, last) * pitch :],
            source[min(i + 3, last) * pitch :],
            weights_T,
            sums,
        )
        for t in range(4, taps, 2):
            a, b = min(i + t, last), min(i + t + 1, last)
            _add_two(source[a * pitch :], source[b * pitch :], weights_T[t], weights_T[t + 1], sums)
        _round(sums, target[s * sums.size :])


@njit(nogil=True, error_model="numpy")
def _sum_four(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, weights_T: np.ndarray, sums: np.ndarray
) -> None:
    """The first four lines, and the half that makes cutting the sums off a rounding."""
    of_a, of_b, of_c, of_d = weights_T[0], weights_T[1], weights_T[2], weights_T[3]
    for i in range(sums.size):
        two = u4(of_a * u4(a[i]) + of_b * u4(b[i]))
        sums[i] = u4(HALF + two + of_c * u4(c[i]) + of_d * u4(d[i]))


@njit(nogil=True, error_model="numpy")
def _add_two(a: np.ndarray, b: np.ndarray, of_a: int, of_b: int, sums: np.ndarray) -> None:
    for i in range(sums.size):
        sums[i] = u4(sums[i] + of_a * u4(a[i]) + of_b * u4(b[i]))


@njit(nogil=True, error_model="numpy")
def _round(sums: np.ndarray, target: np.ndarray) -> None:
    for i in range(sums.size):
        target[i] = np.uint8(min(max(i4(sums[i]) >> i4(BITS), i4(0)), i4(255)))
