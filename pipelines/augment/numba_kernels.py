"""The compiled side of `numba_ops`: one thread distorts one sample after another, in its own small memory.

Every loop is written so that LLVM turns it into SIMD code: over whole planes (one channel, row after row),
without branches, in 32 bits. What would keep LLVM from it: signed indices that might be negative, which numba
guards; sums of integers that numba widens to 64 bits, unless they are cut back at once; writing to an array
that is read, other than in the same place.

Colours are whole numbers from 0 to 255 until they are normalised, and follow PIL's arithmetic to the bit; see
the README beside this file. Nothing here may be compiled with fastmath.

All compiled code is in this file: numba's cache notices changes in the file of the cached function only.

Shape legend: V views (2), N samples, S image size in pixels, P = S * S pixels, C channels (3).
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipelines.batch import BRIGHTNESS, CONTRAST, SATURATION
from pipelines.compiled import cached, compiled

FLOAT32, BFLOAT16, FLOAT16 = range(3)  # what the output is encoded as
LEAVE_HUE = -1  # in place of a shift
PIXELS_AT_ONCE = 1024  # of what needs more than 8 bits each: a long loop, yet all in the first-level cache

# The numbers of one sample and view.
SAMPLE = np.dtype(
    [
        ("flip", np.bool_),
        ("jitter", np.bool_),
        ("grayscale", np.bool_),
        ("blur", np.bool_),
        ("solarize", np.bool_),
        ("order", np.uint8, 4),
        ("brightness", np.float32),
        ("contrast", np.float32),
        ("saturation", np.float32),
        ("hue", np.float32),  # shift in steps of PIL's 8-bit hue, 0 to 255, or LEAVE_HUE
        ("radius", np.int64),  # of the blur's boxes, as in `box_blur.BoxWeights`
        ("inner", np.uint32),
        ("outer", np.uint32),
    ],
    align=True,
)

f4, u4, index = np.float32, np.uint32, np.uint64


@cached
def distort_samples(
    views: np.ndarray,
    samples: np.ndarray,
    max_radius: int,
    scale: np.ndarray,
    offset: np.ndarray,
    out: np.ndarray,
    encoding: int,
    start: int,
    stop: int,
) -> None:
    """Distort the views `start` to `stop - 1`, counted as (sample 0, view 0), (sample 0, view 1), ...

    views       (V, N, 3 P) uint8: channels last
    samples     (V, N) of SAMPLE
    max_radius  of the samples
    scale       (C,) float32: of the normalisation
    offset      (C,) float32: of the normalisation
    out         (V, N, 3 P) uint16, or (V, N, 6 P) for FLOAT32: the encoded pixels, channels last
    encoding    FLOAT32, BFLOAT16 or FLOAT16

    1. Split the channels into planes, mirrored where the sample is flipped.
    2. The colour operations in the sample's order.
    3. Grayscale: one plane from here on.
    4. Blur.
    5. Solarize.
    6. Normalise and encode.
    """
    num_views, num_pixels = views.shape[0], views.shape[2] // 3
    size = round(math.sqrt(num_pixels))
    planes = np.empty((4, num_pixels), np.uint8)  # red, green, blue, gray
    padded = np.empty((2, (size + 2 + 2 * max_radius) ** 2), np.uint8)
    sums = np.empty(PIXELS_AT_ONCE, np.uint32)
    line = np.empty(3 * PIXELS_AT_ONCE, np.float32)
    for i in range(start, stop):
        v, n = i % num_views, i // num_views
        sample = samples[v, n]
        _split(views[v, n], planes.reshape(-1), size, sample.flip)  # 1
        if sample.jitter:
            _jitter(planes, sample)  # 2
        channels = planes[:3]
        if sample.grayscale:
            _gray(planes[0], planes[1], planes[2], planes[3])  # 3
            channels = planes[3:]
        for c in range(len(channels)):
            if sample.blur:
                _blur(channels[c], size, sample, padded[0], padded[1], sums)  # 4
            if sample.solarize:
                _solarize(channels[c])  # 5
        last = len(channels) - 1
        _write(
            channels[0], channels[last // 2], channels[last], scale, offset, line, out[v, n], encoding
        )  # 6


@compiled()
def _split(pixels: np.ndarray, planes: np.ndarray, size: int, flip: bool) -> None:
    """`pixels` (3 P), channels last, into the first three of `planes` (4 P)."""
    size, one, two = index(size), index(1), index(2)
    green, blue = size * size, two * size * size
    for row in range(index(0), green, size):
        if flip:
            last = index(3) * (row + size) - index(3)
            for i in range(size):
                planes[row + i] = pixels[last - index(3) * i]
                planes[green + row + i] = pixels[last - index(3) * i + one]
                planes[blue + row + i] = pixels[last - index(3) * i + two]
        else:
            for i in range(row, row + size):
                planes[i] = pixels[index(3) * i]
                planes[green + i] = pixels[index(3) * i + one]
                planes[blue + i] = pixels[index(3) * i + two]


@compiled()
def _jitter(planes: np.ndarray, sample: np.void) -> None:
    """The four colour operations on `planes` (4, P), the last of them scratch, in the sample's order."""
    r, g, b, gray = planes[0], planes[1], planes[2], planes[3]
    for place in range(4):
        operation = sample.order[place]
        if operation == BRIGHTNESS:
            for c in range(3):
                _blend(planes[c], f4(0), sample.brightness)
        elif operation == CONTRAST:
            _gray(r, g, b, gray)
            mean = f4((2 * _sum(gray) + gray.size) // (2 * gray.size))
            for c in range(3):
                _blend(planes[c], mean, sample.contrast)
        elif operation == SATURATION:
            _saturate(r, g, b, sample.saturation)
        elif sample.hue != LEAVE_HUE:
            _turn_hue(r, g, b, sample.hue)


@compiled()
def _blended(other: float, value: float, factor: float) -> int:
    """factor * value + (1 - factor) * other, cut to a whole number from 0 to 255."""
    return np.uint8(min(max(other + factor * (value - other), f4(0)), f4(255)))


@compiled()
def _blend(plane: np.ndarray, other: float, factor: float) -> None:
    for i in range(plane.size):
        plane[i] = _blended(other, f4(plane[i]), factor)


@compiled()
def _luma(r: float, g: float, b: float) -> float:
    """PIL's gray before its fraction is cut off. The sum is exact in float32, being below 2^24."""
    return (f4(19595) * r + f4(38470) * g + f4(7471) * b + f4(32768)) * f4(2**-16)


@compiled()
def _gray(r: np.ndarray, g: np.ndarray, b: np.ndarray, gray: np.ndarray) -> None:
    for i in range(gray.size):
        gray[i] = np.uint8(_luma(f4(r[i]), f4(g[i]), f4(b[i])))


@compiled()
def _sum(plane: np.ndarray) -> int:
    total = index(0)
    for i in range(plane.size):
        total += index(plane[i])
    return np.int64(total)


@compiled()
def _saturate(r: np.ndarray, g: np.ndarray, b: np.ndarray, factor: float) -> None:
    for i in range(r.size):
        red, green, blue = f4(r[i]), f4(g[i]), f4(b[i])
        gray = f4(np.int32(_luma(red, green, blue)))
        r[i] = _blended(gray, red, factor)
        g[i] = _blended(gray, green, factor)
        b[i] = _blended(gray, blue, factor)


@compiled()
def _turn_hue(r: np.ndarray, g: np.ndarray, b: np.ndarray, shift: float) -> None:
    """To 8-bit hue, saturation and value and back, as PIL does, whose divisions in float32 matter.

    1. The hue in sixths of a turn: the sector of the largest channel, and the middle channel's place in it.
    2. The hue in 255ths of a turn, shifted, and the saturation, both cut to whole numbers.
    3. The way back: how far each channel lies below the largest one, in 85ths of the chroma.
    """
    for i in range(r.size):
        red, green, blue = f4(r[i]), f4(g[i]), f4(b[i])
        high = max(red, max(green, blue))
        chroma = high - min(red, min(green, blue))

        # 1
        if high == red:
            sector, difference = f4(0), green - blue
        elif high == green:
            sector, difference = f4(2), blue - red
        else:
            sector, difference = f4(4), red - green
        place = (chroma - abs(difference)) / max(chroma, f4(1))
        sixths = (sector + f4(1)) - place if difference >= f4(0) else (sector - f4(1)) + place
        turn = sixths / f4(6)
        if turn < f4(0):
            turn += f4(1)

        # 2
        hue = f4(np.int32(f4(255) * turn)) + shift
        if hue >= f4(256):
            hue -= f4(256)
        saturation = f4(np.int32(f4(255) * chroma / max(high, f4(1))))

        # 3
        x = hue + hue
        r[i] = _lowered(high, saturation, min(x - f4(85), f4(425) - x))
        g[i] = _lowered(high, saturation, max(f4(85) - x, x - f4(255)))
        b[i] = _lowered(high, saturation, max(f4(255) - x, x - f4(425)))


@compiled()
def _lowered(high: float, saturation: float, steps: float) -> int:
    """`high` less its share saturation / 255 * steps / 85, with steps cut to 0..85, to the nearest number."""
    share = saturation * min(max(steps, f4(0)), f4(85))
    return np.uint8((high * (f4(255 * 85) - share) + f4(255 * 85 // 2 + 0.5)) * f4(1 / (255 * 85)))


@compiled()
def _blur(
    plane: np.ndarray, size: int, sample: np.void, this: np.ndarray, other: np.ndarray, sums: np.ndarray
) -> None:
    """Blur `plane` (P) by three box blurs along the rows, then three along the columns.

    `this` and `other` have room for S + 2 reach rows of S + 2 reach pixels, uint8. A pass takes all rows as
    one long line, padding included; what it makes of the padding is then replaced by copies of the edge.
    """
    reach = 1 + sample.radius
    width = size + 2 * reach
    first, length = reach * width, size * width
    for y in range(size):
        _copy(plane[y * size :], this[first + y * width + reach :][:size])
    for step in (1, 1, 1, width, width, width):
        if step == 1:
            for y in range(size):
                row = this[first + y * width :]
                for x in range(reach):
                    row[x] = row[reach]
                    row[reach + size + x] = row[reach + size - 1]
        else:
            for y in range(reach):
                _copy(this[first:], this[y * width :][:width])
                _copy(this[first + length - width :], this[first + length + y * width :][:width])
        _box_blur(this, first, length, step, sample, sums, other)
        this, other = other, this
    for y in range(size):
        _copy(this[first + y * width + reach :], plane[y * size :][:size])


@compiled()
def _copy(source: np.ndarray, target: np.ndarray) -> None:
    for i in range(target.size):
        target[i] = source[i]


@compiled()
def _box_blur(
    source: np.ndarray,
    first: int,
    length: int,
    step: int,
    sample: np.void,
    sums: np.ndarray,
    target: np.ndarray,
) -> None:
    """One pass over the pixels from `first` on; neighbours are `step` apart. See `box_blur.py`."""
    far = (1 + sample.radius) * step
    for start in range(first, first + length, PIXELS_AT_ONCE):
        near = sums[: min(PIXELS_AT_ONCE, first + length - start)]
        _copy(source[start:], near)
        for t in range(1, 1 + sample.radius):
            _add_both(source[start - t * step :], source[start + t * step :], near)
        _weigh(near, sample.inner, source[start - far :], source[start + far :], sample.outer, target[start:])


@compiled()
def _add_both(before: np.ndarray, after: np.ndarray, sums: np.ndarray) -> None:
    for i in range(sums.size):
        sums[i] += u4(before[i]) + u4(after[i])


@compiled()
def _weigh(
    near: np.ndarray, inner: int, before: np.ndarray, after: np.ndarray, outer: int, target: np.ndarray
) -> None:
    """The weights have 24 bits after the binary point; no sum exceeds 32 bits."""
    for i in range(near.size):
        far = u4(before[i]) + u4(after[i])
        target[i] = u4(inner * near[i] + outer * far + u4(1 << 23)) >> u4(24)


@compiled()
def _solarize(plane: np.ndarray) -> None:
    """Invert the values from the middle of the range upwards."""
    for i in range(plane.size):
        plane[i] = min(plane[i], np.uint8(255) - plane[i])


@compiled()
def _write(
    r: np.ndarray,
    g: np.ndarray,
    b: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    line: np.ndarray,
    out: np.ndarray,
    encoding: int,
) -> None:
    """Normalise and encode all pixels, some of them at a time."""
    words = 2 if encoding == FLOAT32 else 1  # per value
    for start in range(0, r.size, PIXELS_AT_ONCE):
        stop = min(start + PIXELS_AT_ONCE, r.size)
        values = line[: 3 * (stop - start)]
        _normalise(r[start:stop], g[start:stop], b[start:stop], scale, offset, values)
        _encode(values, out[3 * words * start :], encoding)


@compiled()
def _normalise(
    r: np.ndarray,
    g: np.ndarray,
    b: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    line: np.ndarray,
) -> None:
    """`line` gets the pixels as float32, channels last."""
    scale_r, scale_g, scale_b = scale[0], scale[1], scale[2]
    offset_r, offset_g, offset_b = offset[0], offset[1], offset[2]
    for i in range(r.size):
        line[3 * i] = f4(r[i]) * scale_r + offset_r
        line[3 * i + 1] = f4(g[i]) * scale_g + offset_g
        line[3 * i + 2] = f4(b[i]) * scale_b + offset_b


@compiled()
def _encode(line: np.ndarray, out: np.ndarray, encoding: int) -> None:
    """`line` rounded to the nearest value of its encoding, ties to even, as 16-bit words."""
    if encoding == FLOAT16:
        for i in range(line.size):
            out[i] = _float16_bits(line[i])
    elif encoding == BFLOAT16:
        for i in range(line.size):
            bits = _float32_bits(line[i])
            odd = (bits >> u4(16)) & u4(1)
            out[i] = u4(bits + u4(0x7FFF) + odd) >> u4(16)
    else:
        for i in range(line.size):
            bits = _float32_bits(line[i])
            out[2 * i] = bits
            out[2 * i + 1] = bits >> u4(16)


@intrinsic
def _float32_bits(context, value):
    """uint32: the bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float16_bits(context, value):
    """uint16: the bits of a float32 rounded to float16, which numba does not know on CPUs."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate
