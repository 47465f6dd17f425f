"""Triton kernel of all distortions but the blur, and the function that launches it.

Shape legend: V views (2), N samples, S = H = W image size in pixels, C channels (3), K places in the order of
the colour operations (4).
The kernel indexes the V * N images, and the S * S * C bytes of each in a row ("lanes").
Colours are whole numbers in float32 from 0 to 255, so that sums and products are exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines import batch
from pipelines.batch import ViewParams

CONTRAST = tl.constexpr(batch.CONTRAST)
SATURATION = tl.constexpr(batch.SATURATION)
HUE = tl.constexpr(batch.HUE)
WARP = tl.constexpr(32)

# One pixel per thread: with more, Triton would pass every pixel through shared memory to widen the stores.
_RECOLOUR_WARPS = 32
_RECOLOUR_PIXELS = 32 * _RECOLOUR_WARPS


@triton.jit
def _gray(r, g, b):
    """PIL's luma; every sum is a whole number below 2**24, so exact."""
    return tl.floor((19595.0 * r + 38470.0 * g + 7471.0 * b + 32768.0) * (1 / 65536))


@triton.jit
def _blend(other, x, factor):
    """PIL's blend, which rounds the product. The minimum never acts, but no compiler fuses across it."""
    step = tl.minimum(factor * (x - other), 1024.0)
    return tl.floor(tl.minimum(tl.maximum(other + step, 0.0), 255.0))


@triton.jit
def _loses_a_step(hue):
    """Whether PIL's float32 comes out just below this hue where it is exactly whole; all have been tried."""
    lost = (hue >= 1) & (hue <= 31)
    lost |= (hue >= 88) & (hue <= 104) & (hue % 4 == 0)
    lost |= (hue >= 129) & (hue <= 149) & (hue % 2 == 1)
    lost |= (hue >= 153) & (hue <= 209) & (hue % 4 == 1)
    return lost | (hue == 176) | (hue == 184)


@triton.jit
def _shift_hue(r, g, b, shift):
    """PIL's way to HSV in 8 bits and back, with `shift` 256ths of a turn added to the hue.

    What is added to the numerators keeps quotients away from whole numbers: no division needs to be exact.
    """
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    from_g, from_b = 2 * chroma + b - r, 4 * chroma + r - g  # angles are sixths of a turn, times the chroma
    angle = tl.where(r == value, g - b, tl.where(g == value, from_g, from_b))
    angle = 85 * tl.where(angle < 0, angle + 6 * chroma, angle)
    divisor = 2 * tl.maximum(chroma, 1.0)
    hue = tl.floor((angle + 0.25) / divisor)
    saturation = tl.floor((255 * chroma + 0.25) / tl.maximum(value, 1.0))

    is_whole = hue * divisor == angle
    hue = hue.to(tl.int32)
    hue = tl.where(is_whole & _loses_a_step(hue), hue - 1, hue)
    turned = 2.0 * ((hue + shift) & 255).to(tl.float32)  # in 85ths of a sixth of a turn

    r = _from_hsv(tl.minimum(turned - 85, 425 - turned), saturation, value)
    g = _from_hsv(tl.maximum(85 - turned, turned - 255), saturation, value)
    b = _from_hsv(tl.maximum(255 - turned, turned - 425), saturation, value)
    return r, g, b


@triton.jit
def _from_hsv(distance, saturation, value):
    """A channel: the value less a share of the saturation, which grows with the `distance` to the hue."""
    missing = saturation * tl.minimum(tl.maximum(distance, 0.0), 85.0)
    return tl.floor((value * (21675 - missing) + 10837.5) * (1 / 21675))


@triton.jit
def _jitter(r, g, b, num_places, drawn, mean):
    """The first `num_places` colour operations, in the drawn order."""
    order, brightness, contrast, saturation, hue, shift = drawn
    for place in range(num_places):
        operation = (order >> (8 * place)) & 3
        if operation == HUE:
            if hue != 0:
                r, g, b = _shift_hue(r, g, b, shift)
        else:
            factor = tl.where(operation == CONTRAST, contrast, brightness)
            factor = tl.where(operation == SATURATION, saturation, factor)
            if factor != 1:
                other = tl.zeros_like(r) + tl.where(operation == CONTRAST, mean, 0.0)
                if operation == SATURATION:
                    other = _gray(r, g, b)
                r, g, b = _blend(other, r, factor), _blend(other, g, factor), _blend(other, b, factor)
    return r, g, b


@triton.jit
def _load_pixels(image, first, mirrored, SIZE: tl.constexpr, PIXELS: tl.constexpr):
    """Colours of the pixels `first`, ...; beyond the image there is black, which no colour operation but a
    change of contrast lightens.
    """
    pixel = first + tl.arange(0, PIXELS)
    exists = pixel < SIZE * SIZE
    source = tl.where(mirrored, pixel + (SIZE - 1) - 2 * (pixel % SIZE), pixel)
    r = tl.load(image + 3 * source, exists, other=0).to(tl.float32)
    g = tl.load(image + 3 * source + 1, exists, other=0).to(tl.float32)
    b = tl.load(image + 3 * source + 2, exists, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def finish(x, lane, solarize, scale_C, offset_C):
    """Solarize, then normalise by the lane's channel."""
    x = tl.where(solarize, tl.minimum(x, 255 - x), x)
    channel = lane % 3
    scale = tl.where(channel == 0, scale_C[0], tl.where(channel == 1, scale_C[1], scale_C[2]))
    offset = tl.where(channel == 0, offset_C[0], tl.where(channel == 1, offset_C[1], offset_C[2]))
    return x * scale + offset


@triton.jit
def recolour_kernel(
    views,  # uint8 (V, N, H, W, C)
    recoloured,  # uint8 (V, N, H, W, C): written for the images that are blurred afterwards
    out,  # (V, N, H, W, C): written for the others
    flip,  # bool (V, N)
    jitter,  # bool (V, N)
    order,  # int32 (V, N): K bytes
    brightness,  # float32 (V, N)
    contrast,  # float32 (V, N)
    saturation,  # float32 (V, N)
    hue,  # float32 (V, N)
    grayscale,  # bool (V, N)
    blur,  # float32 (V, N)
    solarize,  # bool (V, N)
    scale_C,  # 3 numbers
    offset_C,  # 3 numbers
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,  # at a time, a power of two and at least WARP
):
    """Everything but the blur. One program per image, so that a second reading can find it in the cache.

    1. Images with a change of contrast: the mean of the gray image, as it is when the contrast's turn comes.
    2. All colours, and the result; for images that are blurred afterwards, 8 bits before they are solarized.
    """
    index = tl.program_id(0)
    base = index.to(tl.int64) * (SIZE * SIZE * 3)
    is_flipped, is_jittered = tl.load(flip + index), tl.load(jitter + index)
    is_gray, is_solarized = tl.load(grayscale + index), tl.load(solarize + index)
    is_blurred = tl.load(blur + index) > 0
    order_of_4, factor = tl.load(order + index), tl.load(contrast + index)
    turns = tl.load(hue + index)
    shift = (turns.to(tl.float64) * 255).to(tl.int32)  # 8 bits, cut off as torchvision does
    drawn = (
        order_of_4,
        tl.load(brightness + index),
        factor,
        tl.load(saturation + index),
        turns,
        shift,
    )

    # 1
    mean = 0.0
    if is_jittered & (factor != 1):
        num_before = 0
        for place in tl.static_range(1, 4):
            num_before = tl.where(((order_of_4 >> (8 * place)) & 3) == CONTRAST, place, num_before)
        sums = tl.zeros((PIXELS,), tl.float32)
        for first in range(0, SIZE * SIZE, PIXELS):
            r, g, b = _load_pixels(views + base, first, is_flipped, SIZE, PIXELS)
            r, g, b = _jitter(r, g, b, num_before, drawn, mean)
            sums += _gray(r, g, b)
        total = tl.sum(sums.to(tl.int32), axis=0)
        mean = ((2 * total + SIZE * SIZE) // (2 * SIZE * SIZE)).to(tl.float32)

    # 2
    num_places = tl.where(is_jittered, 4, 0)
    for first in range(0, SIZE * SIZE, PIXELS):
        r, g, b = _load_pixels(views + base, first, is_flipped, SIZE, PIXELS)
        r, g, b = _jitter(r, g, b, num_places, drawn, mean)
        if is_gray:
            y = _gray(r, g, b)
            r, g, b = y, y, y
        # A thread has a pixel, but neighbouring threads had better write neighbouring numbers: a warp hands
        # its pixels round and gets three times WARP lanes.
        packed = (r + 256 * g + 65536 * b).to(tl.int32).reshape(PIXELS // WARP, WARP)
        for part in tl.static_range(3):
            of_row = part * WARP + tl.arange(0, WARP)[None, :]
            source = tl.broadcast_to(of_row // 3, packed.shape)
            value = (tl.gather(packed, source, axis=1) >> (8 * (of_row % 3))) & 255
            lane = 3 * first + tl.arange(0, PIXELS // WARP)[:, None] * (3 * WARP) + of_row
            exists = lane < 3 * SIZE * SIZE
            if is_blurred:
                tl.store(recoloured + base + lane, value.to(tl.uint8), exists)
            else:
                y = finish(value.to(tl.float32), of_row, is_solarized, scale_C, offset_C)
                tl.store(out + base + lane, y.to(out.dtype.element_ty), exists)


def recolour(
    views_VNHWC: Tensor,
    params: ViewParams,
    scale_C: tuple[float, ...],
    offset_C: tuple[float, ...],
    recoloured_VNHWC: Tensor,
    out_VNHWC: Tensor,
) -> None:
    """Write the images that get no blur into `out_VNHWC`, the others as uint8 into `recoloured_VNHWC`.

    All tensors are contiguous and on one device; `views_VNHWC` is uint8, `out_VNHWC` float32 or half.
    """
    num_views, num_samples, size = views_VNHWC.shape[:3]
    recolour_kernel[(num_views * num_samples,)](
        views_VNHWC,
        recoloured_VNHWC,
        out_VNHWC,
        params.flip_VN,
        params.jitter_VN,
        params.order_VN4.view(torch.int32),
        params.brightness_VN,
        params.contrast_VN,
        params.saturation_VN,
        params.hue_VN,
        params.grayscale_VN,
        params.blur_VN,
        params.solarize_VN,
        scale_C,
        offset_C,
        SIZE=size,
        PIXELS=_RECOLOUR_PIXELS,
        num_warps=_RECOLOUR_WARPS,
        enable_fp_fusion=True,
    )
