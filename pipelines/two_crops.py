"""Both crops of each sample from one decode, by compiled code on several threads; PIL's pixels to the bit.

Threads are plain Python threads that run compiled code without the GIL, once per batch: each takes the next
sample until none is left. They share nothing but that count, and what they write lies apart: every decode has
a decoder and memory of its own. numba's own threads would end the process where two threads start them at a
time, or where a process is forked after their first use, and both happen beside data loaders.

Shape legend: V views (2), N samples, S image size in pixels.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipelines import decode_numba, resize_numba
from pipelines.compiled import cached
from pipelines.decode_numba import OTHER_SIZE, UNREADABLE, decode, image_size
from pipelines.resize_numba import crop_and_resize

OUTSIDE = 3  # the bytes lie outside the file, the box outside the image, or raw pixels are not of their size

# numba keeps what it compiled until this file changes. As a default argument this is part of what it is kept
# under, so that what else went into it counts, too.
_INGREDIENTS = zlib.crc32(
    b"".join(Path(module.__file__).read_bytes() for module in (decode_numba, resize_numba)),
    resize_numba.CHOOSES_ORDER,
)


def decode_and_crop(
    file_bytes: np.ndarray,
    ptr_N: np.ndarray,
    size_N: np.ndarray,
    height_N: np.ndarray,
    width_N: np.ndarray,
    is_raw_N: np.ndarray,
    box_VN4: np.ndarray,
    views_VNSS3: np.ndarray,
    threads: int,
) -> np.ndarray:
    """Decode each sample once, or take its raw pixels, and write both views' crops, resized as PIL does.

    file_bytes   uint8 (num_bytes,): such as a mapped .beton file
    ptr_N        int64: where the sample's bytes start
    size_N       int64: how many they are
    height_N     int32: the stored image's, in pixels
    width_N      int32
    is_raw_N     bool: stored as height * width * 3 bytes, the RGB pixels, not as JPEG
    box_VN4      int32: top, left, height, width of each view's crop
    views_VNSS3  uint8, C-contiguous: written to
    threads      at least 1

    Returns int32 (N,): 0 where both views are written; else why not, and the views are undefined: UNREADABLE
    (PIL may know better), OTHER_SIZE (the JPEG is not of the stated size) or OUTSIDE. No numbers or bytes
    make it read or write outside the arrays.

    The first call of a process compiles, which takes seconds; the result is kept on disk (numba's cache).
    """
    numbers = (ptr_N, np.int64), (size_N, np.int64), (height_N, np.int32), (width_N, np.int32)
    arrays = [np.ascontiguousarray(array, dtype) for array, dtype in (*numbers, (is_raw_N, np.bool_))]
    box_VN4 = np.ascontiguousarray(box_VN4, np.int32)
    num_samples, size = len(ptr_N), views_VNSS3.shape[2]
    assert all(len(array) == num_samples for array in arrays) and box_VN4.shape == (2, num_samples, 4)
    assert views_VNSS3.shape == (2, num_samples, size, size, 3) and views_VNSS3.dtype == np.uint8
    status_N, next_1 = np.full(num_samples, UNREADABLE, np.int32), np.zeros(1, np.int64)
    arguments = (file_bytes, *arrays, box_VN4, views_VNSS3, status_N, next_1)
    with ThreadPoolExecutor(threads) as pool:
        for worker in [pool.submit(_take_samples, *arguments) for _ in range(threads)]:
            worker.result()  # raises what the thread raised
    return status_N


@intrinsic
def _take_next(context, count):
    """Add 1 to an int64 (1,) that threads share; returns its value before."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(count), generate


@cached
def _take_samples(
    file_bytes: np.ndarray,
    ptr_N: np.ndarray,
    size_N: np.ndarray,
    height_N: np.ndarray,
    width_N: np.ndarray,
    is_raw_N: np.ndarray,
    box_VN4: np.ndarray,
    views_VNSS3: np.ndarray,
    status_N: np.ndarray,
    next_1: np.ndarray,
    ingredients: int = _INGREDIENTS,
) -> None:
    """What one thread does. `next_1` is the first sample that no thread has taken."""
    while True:
        n = _take_next(next_1)
        if n >= ptr_N.size:
            return
        start, size, height, width = ptr_N[n], size_N[n], np.int64(height_N[n]), np.int64(width_N[n])
        is_inside = start >= 0 and 0 < size <= file_bytes.size and start <= file_bytes.size - size
        is_inside &= not is_raw_N[n] or (height > 0 and width > 0 and size == 3 * height * width)
        for v in range(2):
            top, left, h, w = box_VN4[v, n]
            is_inside &= 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        if not is_inside:
            status_N[n] = OUTSIDE
            continue
        stored = file_bytes[start : start + size]
        if is_raw_N[n]:
            pixels_HW3 = stored.reshape((height, width, 3))
        else:
            found = image_size(stored)
            if found != (height, width):  # before as much memory is taken as is stated
                status_N[n] = OTHER_SIZE if found[0] else UNREADABLE
                continue
            pixels_HW3 = np.empty((height, width, 3), np.uint8)
            status_N[n] = decode(stored, pixels_HW3)
            if status_N[n] != 0:
                continue
        status_N[n] = 0
        for v in range(2):
            top, left, h, w = box_VN4[v, n]
            crop_and_resize(pixels_HW3, (top, left, h, w), views_VNSS3[v, n])
