"""All six distortions by DALI's own operators, for users who want DALI alone; not quite the paper's.

Every sample gets our drawn numbers, so that probabilities and strengths are the paper's. What differs from
`augment.reference`: the colour operations come in one order (brightness, contrast, saturation, hue) instead
of a drawn one; the hue turns in the plane of YIQ instead of HSV; the blur is a true Gaussian, mirrored at the
border, where PIL has three box blurs; and values are rounded once, at the end of the colour operations,
instead of cut off after each. The README of `pipelines.augment` has the measured differences.

Shape legend: V views (2), N samples, D numbers of a view.
"""

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from pipelines.batch import ViewParams

# The numbers of a view of one sample, in this order.
FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, BLUR, SOLARIZE, NUM_NUMBERS = range(10)


def numbers_of(params: ViewParams) -> np.ndarray:
    """float32 (N, V, D): `params` for `distort`."""
    columns = (
        params.flip_VN,
        params.jitter_VN,
        params.brightness_VN,
        params.contrast_VN,
        params.saturation_VN,
        360 * params.hue_VN,  # degrees
        params.grayscale_VN,
        params.blur_VN,
        params.solarize_VN,
    )
    numbers_VND = np.stack([np.asarray(column, np.float32) for column in columns], axis=2)
    return np.ascontiguousarray(numbers_VND.swapaxes(0, 1))


def distort(view: DataNode, numbers: DataNode) -> DataNode:
    """The distorted view, uint8 HWC like `view`, with its D `numbers` of each sample.

    For a graph with conditionals: a sample takes part in what was drawn for it alone.
    """
    if numbers[FLIP] > 0:
        view = fn.flip(view, horizontal=1)
    if numbers[JITTER] > 0:
        view = _jitter(view, numbers)
    if numbers[GRAYSCALE] > 0:
        view = fn.hsv(view, saturation=0.0)
    if numbers[BLUR] > 0:
        view = fn.gaussian_blur(view, sigma=numbers[BLUR])
    if numbers[SOLARIZE] > 0:
        view = math.min(view, types.Constant(255, dtype=types.UINT8) - view)
    return view


def _jitter(view: DataNode, numbers: DataNode) -> DataNode:
    brightness, contrast = numbers[BRIGHTNESS], numbers[CONTRAST]
    gray = fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
    mean = fn.reductions.mean(gray, axes=[0, 1, 2], keep_dims=True)
    blended = math.clamp(brightness * (contrast * view + (1 - contrast) * mean), 0, 255)
    return fn.hsv(blended, hue=numbers[HUE], saturation=numbers[SATURATION], dtype=types.UINT8)
