"""Triton kernels of PIL's blur, whose formulas are in `box_blur.py`, and the functions that launch them.

Shape legend: V views (2), N samples, H rows, W columns, S = H = W image size in pixels, C channels (3).
Kernels index the V * N images, and the S * C bytes of a column of pixels ("lanes").
"""

import triton
import triton.language as tl
from torch import Tensor

from pipelines.augment.box_blur import BoxWeights
from pipelines.augment.kernels_colour import finish

_WEIGHTS_IMAGES = 128
_BLUR_LANES, _BLUR_WARPS = 64, 2
_BLUR_STEPS = 128  # at most; for the 6 times the reach around them, most of the work is done once more


@triton.jit
def _rounded(x):
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def box_weights_kernel(
    sigma,  # float32 (V, N): in pixels, 0 for no blur
    radius,  # int32 (V, N)
    inner,  # int32 (V, N)
    outer,  # int32 (V, N)
    num_images,  # V * N
    IMAGES: tl.constexpr,  # per program, a power of two
):
    """`box_blur.box_weights` step by step: PIL's float32 numbers, each rounded from double precision."""
    image = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    exists = image < num_images
    s = tl.load(sigma + image, exists, other=0).to(tl.float64)
    variance = _rounded(_rounded(s * s) / 3)
    length = _rounded(tl.sqrt(12 * variance + 1))
    whole = tl.floor((length - 1) / 2)
    part = _rounded((2 * whole + 1) * _rounded(whole * (whole + 1) - _rounded(3 * variance)))
    part = _rounded(part / _rounded(6 * _rounded(variance - (whole + 1) * (whole + 1))))
    extent = _rounded(whole + part)
    pixels = extent.to(tl.int32)
    weight = _rounded(16777216 / _rounded(2 * extent + 1)).to(tl.int32)
    tl.store(radius + image, pixels, exists)
    tl.store(inner + image, weight, exists)
    tl.store(outer + image, (16777216 - (2 * pixels + 1) * weight) // 2, exists)


@triton.jit
def _slide(window, x, position, SIZE: tl.constexpr, REACH: tl.constexpr):
    """The window with `x`, the pixels at `position`, as the newest; beyond the image its edge goes on."""
    moved = ()
    for place in tl.static_range(1, 2 * REACH + 1):
        moved += (tl.where(position <= 0, x, window[place]),)
    moved += (tl.where(position < SIZE, x, window[2 * REACH]),)
    return moved


@triton.jit
def _weigh(window, weights, REACH: tl.constexpr):
    """The pixels in the middle of the window after one pass; the sum fills 32 bits without a sign."""
    total = weights[0] * window[REACH] + 8388608
    for distance in tl.static_range(1, REACH + 1):
        total += weights[distance] * (window[REACH - distance] + window[REACH + distance])
    return total >> 24


@triton.jit
def blur_rows_kernel(
    source,  # uint8 (V, N, H, W, C)
    target,  # (V, N, W, H, C): uint8, or of a float type to be solarized and normalised
    sigma,  # float32 (V, N): images with 0 are left out
    radius,  # int32 (V, N)
    inner,  # int32 (V, N)
    outer,  # int32 (V, N)
    solarize,  # bool (V, N)
    scale_C,  # 3 numbers
    offset_C,  # 3 numbers
    REACH: tl.constexpr,  # of the widest box
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,  # columns per program
    LANES: tl.constexpr,  # per program, a power of two
):
    """Three passes along the rows, which become the columns of the target.

    A program goes along some rows, all lanes of a column at a time. Each pass has a window of the 2 REACH + 1
    latest columns of its input in registers, and what it makes of them is the next pass's latest column.
    """
    STRIPS: tl.constexpr = (3 * SIZE + LANES - 1) // LANES
    PARTS: tl.constexpr = (SIZE + STEPS - 1) // STEPS
    index = tl.program_id(0) // (STRIPS * PARTS)
    if tl.load(sigma + index) > 0:
        pixels, near, far = tl.load(radius + index), tl.load(inner + index), tl.load(outer + index)
        is_solarized = tl.load(solarize + index)
        weights = ()
        for distance in tl.static_range(REACH + 1):
            weight = tl.where(distance <= pixels, near, tl.where(distance == pixels + 1, far, 0))
            weights += (weight.to(tl.uint32),)
        base = index.to(tl.int64) * (SIZE * SIZE * 3)
        lane = tl.program_id(0) % STRIPS * LANES + tl.arange(0, LANES)
        exists = lane < 3 * SIZE
        row = source + base + (lane - lane % 3) * SIZE + lane % 3
        start = tl.program_id(0) // STRIPS % PARTS * STEPS
        stop = tl.minimum(start + STEPS, SIZE)

        first = ()
        for _ in tl.static_range(2 * REACH + 1):
            first += (tl.zeros((LANES,), tl.uint32),)
        second, third = first, first
        for column in range(tl.maximum(start - 3 * REACH, 0), stop + 3 * REACH):
            x = tl.load(row + 3 * tl.minimum(column, SIZE - 1), exists, other=0).to(tl.uint32)
            first = _slide(first, x, column, SIZE, REACH)
            second = _slide(second, _weigh(first, weights, REACH), column - REACH, SIZE, REACH)
            third = _slide(third, _weigh(second, weights, REACH), column - 2 * REACH, SIZE, REACH)
            done = column - 3 * REACH
            if done >= start:
                x = _weigh(third, weights, REACH)
                place = target + base + done * (3 * SIZE) + lane
                if target.dtype.element_ty == tl.uint8:
                    tl.store(place, x.to(tl.uint8), exists)
                else:
                    y = finish(x.to(tl.float32), lane, is_solarized, scale_C, offset_C)
                    tl.store(place, y.to(target.dtype.element_ty), exists)


def box_weights(sigma_VN: Tensor, weights: BoxWeights) -> None:
    """Write those of float32 sigmas into three tensors of the same shape, int32. All are contiguous."""
    box_weights_kernel[(triton.cdiv(sigma_VN.numel(), _WEIGHTS_IMAGES),)](
        sigma_VN, *weights, sigma_VN.numel(), IMAGES=_WEIGHTS_IMAGES, enable_fp_fusion=False
    )


def blur_rows(
    source_VNHWC: Tensor,
    sigma_VN: Tensor,
    weights: BoxWeights,
    reach: int,
    solarize_VN: Tensor,
    scale_C: tuple[float, ...],
    offset_C: tuple[float, ...],
    target_VNWHC: Tensor,
) -> None:
    """Blur along the rows, which become columns, the images with a sigma; the others are not written.

    The source is uint8. So can the target be; one of a float type is solarized and normalised. `reach` is
    that of the widest box: 12 at most, or the window leaves the registers. All tensors are contiguous and on
    one device.
    """
    num_views, num_samples, size = source_VNHWC.shape[:3]
    steps = triton.cdiv(size, triton.cdiv(size, _BLUR_STEPS))
    programs_per_image = triton.cdiv(3 * size, _BLUR_LANES) * triton.cdiv(size, steps)
    blur_rows_kernel[(num_views * num_samples * programs_per_image,)](
        source_VNHWC,
        target_VNWHC,
        sigma_VN,
        *weights,
        solarize_VN,
        scale_C,
        offset_C,
        REACH=reach,
        SIZE=size,
        STEPS=steps,
        LANES=_BLUR_LANES,
        num_warps=_BLUR_WARPS,
        enable_fp_fusion=True,
    )
