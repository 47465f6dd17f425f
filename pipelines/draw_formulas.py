"""From uniform numbers to the numbers of the distortions, as formulas on arrays.

They use nothing but + - * /, square roots and rounding, which IEEE 754 defines to the last bit: any processor
and any release of numpy draws the same numbers. That is why there is an `exp` here: libraries' differ.
"""

import math
from itertools import permutations
from typing import NamedTuple

import numpy as np

from pipelines.config import ViewConfig

# Which block of four uniform numbers feeds what. A new distortion takes a new block, so that the numbers of
# the old ones stay as they are.
CROP_TRIES = 10  # blocks 0 to 9: area, aspect ratio, top, left of each try
BLOCK_SWITCHES = 10  # flip, jitter, grayscale, solarize
BLOCK_COLOUR = 11  # brightness, contrast, saturation, hue
BLOCK_BLUR_AND_ORDER = 12  # whether to blur, sigma, order of the colour operations, unused
NUM_BLOCKS = 13

ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)  # (24, 4)

Real = np.ndarray | float  # float64; whole numbers too
Truth = np.ndarray | bool
FourReals = tuple[Real, Real, Real, Real] | np.ndarray  # an array has them along its first axis


class ViewSpec(NamedTuple):
    """The distributions of one view: the fields of `ViewConfig`, and a logarithm."""

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    log_crop_ratio: tuple[float, float]
    flip_p: float
    jitter_p: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale_p: float
    blur_p: float
    blur_sigma: tuple[float, float]
    solarize_p: float


class Distortions(NamedTuple):
    """What is drawn for a view beside its crop; where it is not applied, its identity."""

    flip: Truth
    jitter: Truth
    order: Real  # row of `ORDERS`
    brightness: Real
    contrast: Real
    saturation: Real
    hue: Real
    grayscale: Truth
    blur: Real  # sigma in pixels
    solarize: Truth


def view_spec(config: ViewConfig) -> ViewSpec:
    low, high = config.crop_ratio
    return ViewSpec(log_crop_ratio=(math.log(low), math.log(high)), **config.model_dump())


def crop_size(spec: ViewSpec, u_area: Real, u_ratio: Real, height: Real, width: Real) -> tuple[Real, Real]:
    """Height and width of one try, of the image's size: it may be larger, or without extent."""
    area = height * width * between(u_area, spec.crop_scale[0], spec.crop_scale[1])
    ratio = exp(between(u_ratio, spec.log_crop_ratio[0], spec.log_crop_ratio[1]))
    return np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))


def crop_fits(h: Real, w: Real, height: Real, width: Real) -> Truth:
    return (w > 0) & (w <= width) & (h > 0) & (h <= height)


def place_crop(
    u_top: Real, u_left: Real, h: Real, w: Real, height: Real, width: Real
) -> tuple[Real, Real, Real, Real]:
    """Top, left, height and width of a crop that fits, at a uniform place."""
    return integer_below(u_top, height - h + 1), integer_below(u_left, width - w + 1), h, w


def central_crop(spec: ViewSpec, height: Real, width: Real) -> tuple[Real, Real, Real, Real]:
    """Top, left, height and width of the largest central crop whose width / height is in `crop_ratio`.

    At least one pixel wide and high, which torchvision does not see to.
    """
    low, high = spec.crop_ratio
    ratio = width / height
    h = np.maximum(np.where(ratio < low, np.rint(width / low), height), 1.0)
    w = np.maximum(np.where(ratio > high, np.rint(height * high), width), 1.0)
    return np.floor((height - h) / 2), np.floor((width - w) / 2), h, w


def distortions(
    spec: ViewSpec, switches: FourReals, colour: FourReals, blur_and_order: FourReals
) -> Distortions:
    """From the uniform numbers of the three blocks after the crop's."""
    u_flip, u_jitter, u_grayscale, u_solarize = switches
    u_brightness, u_contrast, u_saturation, u_hue = colour
    u_blur, u_sigma, u_order, _ = blur_and_order
    jitter = u_jitter < spec.jitter_p
    return Distortions(
        u_flip < spec.flip_p,
        jitter,
        np.where(jitter, integer_below(u_order, 24.0), 0.0),
        np.where(jitter, between(u_brightness, 1 - spec.brightness, 1 + spec.brightness), 1.0),
        np.where(jitter, between(u_contrast, 1 - spec.contrast, 1 + spec.contrast), 1.0),
        np.where(jitter, between(u_saturation, 1 - spec.saturation, 1 + spec.saturation), 1.0),
        np.where(jitter, between(u_hue, -spec.hue, spec.hue), 0.0),
        u_grayscale < spec.grayscale_p,
        np.where(u_blur < spec.blur_p, between(u_sigma, spec.blur_sigma[0], spec.blur_sigma[1]), 0.0),
        u_solarize < spec.solarize_p,
    )


def between(u: Real, low: float, high: float) -> Real:
    return low + (high - low) * u


def integer_below(u: Real, bound: Real) -> Real:
    """Uniform whole numbers in [0, bound)."""
    return np.floor(u * bound)


def exp(x: Real) -> Real:
    """e^x, to 14 digits for |x| up to 14: the series of e^(x / 32), squared five times."""
    x = x / 32
    y = 1 + x / 12
    for k in range(11, 0, -1):
        y = 1 + x / k * y
    for _ in range(5):
        y = y * y
    return y
