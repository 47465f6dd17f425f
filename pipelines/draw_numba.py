"""The numbers of `pipelines.draw` for one sample, to be called from code that numba compiles.

It is for operations that numba compiles, such as FFCV's: they can draw the crop box of the sample that they
decode, whose index they are handed and whose height and width stand in the dataset's metadata. No Python
objects, no GIL. Today's loader `ffcv` does not call it: it fills its boxes from `pipelines.draw.draw_views`.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload, register_jitable

from pipelines import draw_formulas, random_bits
from pipelines.draw_formulas import (
    BLOCK_BLUR_AND_ORDER,
    BLOCK_COLOUR,
    BLOCK_SWITCHES,
    CROP_TRIES,
    ORDERS,
    ViewSpec,
    central_crop,
    crop_fits,
    crop_size,
    distortions,
    place_crop,
)
from pipelines.random_bits import philox, uniform

# FFCV compiles its operations with fastmath, which numba would hand down to what they call: then the last
# bits would be the compiler's choice.
EXACT = {"fastmath": False, "error_model": "numpy"}

for _formula in (
    random_bits.philox,
    random_bits.uniform,
    draw_formulas.crop_size,
    draw_formulas.crop_fits,
    draw_formulas.place_crop,
    draw_formulas.central_crop,
    draw_formulas.distortions,
    draw_formulas.between,
    draw_formulas.integer_below,
    draw_formulas.exp,
):
    register_jitable(**EXACT)(_formula)


@overload(draw_formulas.choose, jit_options=EXACT)
def _choose(condition, yes, no):  # no type hints: numba wants the very signature of the lambda
    """numba's `np.where` makes an array even of single numbers."""
    return lambda condition, yes, no: yes if condition else no


class SampleParams(NamedTuple):
    """The numbers of one sample and view: the fields of `ViewParams`, with the same types."""

    box: tuple[np.int32, np.int32, np.int32, np.int32]
    flip: np.bool_
    jitter: np.bool_
    order: np.ndarray  # uint8 (4,); not to be written to
    brightness: np.float32
    contrast: np.float32
    saturation: np.float32
    hue: np.float32
    grayscale: np.bool_
    blur: np.float32
    solarize: np.bool_


@njit(nogil=True, **EXACT)
def draw_sample(
    spec: ViewSpec, seed: np.uint64, epoch: int, index: int, view: int, height: int, width: int
) -> SampleParams:
    """All numbers of view 0 or 1 of one sample; `height` and `width` are its stored image's, in pixels.

    `spec` is the view's, from `pipelines.draw_formulas.view_spec`.
    """
    drawn = distortions(
        spec,
        _block(seed, epoch, index, view, BLOCK_SWITCHES),
        _block(seed, epoch, index, view, BLOCK_COLOUR),
        _block(seed, epoch, index, view, BLOCK_BLUR_AND_ORDER),
    )
    return SampleParams(
        draw_box(spec, seed, epoch, index, view, height, width),
        drawn.flip,
        drawn.jitter,
        ORDERS[int(drawn.order)],
        np.float32(drawn.brightness),
        np.float32(drawn.contrast),
        np.float32(drawn.saturation),
        np.float32(drawn.hue),
        drawn.grayscale,
        np.float32(drawn.blur),
        drawn.solarize,
    )


@njit(nogil=True, **EXACT)
def draw_box(
    spec: ViewSpec, seed: np.uint64, epoch: int, index: int, view: int, height: int, width: int
) -> tuple[np.int32, np.int32, np.int32, np.int32]:
    """The crop alone, as top, left, height, width; the steps are those of `draw.random_resized_crop`."""
    whole_h, whole_w = np.float64(height), np.float64(width)
    for attempt in range(CROP_TRIES):  # 1
        u_area, u_ratio, u_top, u_left = _block(seed, epoch, index, view, attempt)
        h, w = crop_size(spec, u_area, u_ratio, whole_h, whole_w)
        if crop_fits(h, w, whole_h, whole_w):  # 2
            return _integers(place_crop(u_top, u_left, h, w, whole_h, whole_w))
    return _integers(central_crop(spec, whole_h, whole_w))  # 3


@njit(nogil=True, **EXACT)
def _block(
    seed: np.uint64, epoch: int, index: int, view: int, block: int
) -> tuple[float, float, float, float]:
    """The four uniform numbers of a block."""
    words = philox(np.uint64(seed), np.uint64(index), np.uint64(epoch), np.uint64(view), np.uint64(block))
    return uniform(words[0]), uniform(words[1]), uniform(words[2]), uniform(words[3])


@njit(nogil=True, **EXACT)
def _integers(
    box: tuple[float, float, float, float],
) -> tuple[np.int32, np.int32, np.int32, np.int32]:
    return np.int32(box[0]), np.int32(box[1]), np.int32(box[2]), np.int32(box[3])
