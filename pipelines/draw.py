"""All the randomness of the distortions: pure functions of (seed, epoch, sample index, view).

Numbers come from a counter-based generator whose counter is (sample index, epoch, view, block), so what a
sample gets does not depend on its batch, its place in it, the rank, the worker or the loader. Each block
gives four uniform numbers; which block feeds what is fixed by the constants below, so that a new distortion
takes a new block and changes none of the old numbers.

Shape legend: V views (2), N samples, T tries of the crop, B blocks, K the four words of a block.
"""

from itertools import permutations

import numpy as np
import torch

from pipelines.batch import ViewParams
from pipelines.config import ViewConfig
from pipelines.random_bits import philox_u32, uniform

CROP_TRIES = 10  # blocks 0 to 9: area, aspect ratio, top, left of each try
BLOCK_SWITCHES = 10  # flip, jitter, grayscale, solarize
BLOCK_COLOUR = 11  # brightness, contrast, saturation, hue
BLOCK_BLUR_AND_ORDER = 12  # whether to blur, sigma, order of the colour operations, unused
NUM_BLOCKS = 13

_ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)


def draw_views(
    views: tuple[ViewConfig, ViewConfig],
    seed: int,
    epoch: int,
    indices_N: np.ndarray,
    heights_N: np.ndarray,
    widths_N: np.ndarray,
) -> ViewParams:
    """Draw the distortions of both views of N samples, as CPU tensors.

    `indices_N` are the samples' positions in the dataset; `heights_N` and `widths_N` the sizes in pixels of
    their stored images, all integers.
    """
    drawn = [
        _draw_view(config, view, seed, epoch, indices_N, heights_N, widths_N)
        for view, config in enumerate(views)
    ]
    return ViewParams(**{name: torch.from_numpy(np.stack([d[name] for d in drawn])) for name in drawn[0]})


def _draw_view(
    config: ViewConfig,
    view: int,
    seed: int,
    epoch: int,
    indices_N: np.ndarray,
    heights_N: np.ndarray,
    widths_N: np.ndarray,
) -> dict[str, np.ndarray]:
    """One view's numbers, under the names of the fields of `ViewParams`."""
    u_KBN = uniform(philox_u32(seed, indices_N, epoch, view, np.arange(NUM_BLOCKS)[:, None]))
    u_BKN = u_KBN.transpose(1, 0, 2)
    u_flip, u_jitter, u_grayscale, u_solarize = u_BKN[BLOCK_SWITCHES]
    u_brightness, u_contrast, u_saturation, u_hue = u_BKN[BLOCK_COLOUR]
    u_blur, u_sigma, u_order, _ = u_BKN[BLOCK_BLUR_AND_ORDER]

    jitter_N = u_jitter < config.jitter_p

    def factor(u_N: np.ndarray, strength: float) -> np.ndarray:
        drawn_N = _between(u_N, max(0.0, 1 - strength), 1 + strength)
        return np.where(jitter_N, drawn_N, 1).astype(np.float32)

    hue_N = np.where(jitter_N, _between(u_hue, -config.hue, config.hue), 0)
    order_N4 = _ORDERS[np.where(jitter_N, _integer_below(u_order, len(_ORDERS)), 0)]
    sigma_N = np.where(u_blur < config.blur_p, _between(u_sigma, *config.blur_sigma), 0)
    return {
        "box_VN4": random_resized_crop(
            u_KBN[:, :CROP_TRIES], config.crop_scale, config.crop_ratio, heights_N, widths_N
        ),
        "flip_VN": u_flip < config.flip_p,
        "jitter_VN": jitter_N,
        "order_VN4": order_N4,
        "brightness_VN": factor(u_brightness, config.brightness),
        "contrast_VN": factor(u_contrast, config.contrast),
        "saturation_VN": factor(u_saturation, config.saturation),
        "hue_VN": hue_N.astype(np.float32),
        "grayscale_VN": u_grayscale < config.grayscale_p,
        "blur_VN": sigma_N.astype(np.float32),
        "solarize_VN": u_solarize < config.solarize_p,
    }


def random_resized_crop(
    u_4TN: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    heights_N: np.ndarray,
    widths_N: np.ndarray,
) -> np.ndarray:
    """int32 boxes of shape (N, 4) as top, left, height, width: torchvision's `RandomResizedCrop`.

    `u_4TN` holds uniform numbers in [0, 1) for the area, aspect ratio, top and left of each try.

    1. T tries: an area uniform in `scale` of the image's, a width / height log-uniform in `ratio`.
    2. The first try that fits into the image is taken, at a uniform place.
    3. Where none fits: the largest central crop whose aspect ratio lies in `ratio`.
    """
    height_N, width_N = np.asarray(heights_N, dtype=np.int64), np.asarray(widths_N, dtype=np.int64)

    # 1
    area_TN = height_N * width_N * _between(u_4TN[0], *scale)
    ratio_TN = np.exp(_between(u_4TN[1], *np.log(ratio)))
    w_TN = np.rint(np.sqrt(area_TN * ratio_TN)).astype(np.int64)
    h_TN = np.rint(np.sqrt(area_TN / ratio_TN)).astype(np.int64)

    # 2
    fits_TN = (w_TN > 0) & (w_TN <= width_N) & (h_TN > 0) & (h_TN <= height_N)
    first_1N = fits_TN.argmax(axis=0)[None]
    h_N, w_N, u_top_N, u_left_N = (
        np.take_along_axis(a_TN, first_1N, axis=0)[0] for a_TN in (h_TN, w_TN, u_4TN[2], u_4TN[3])
    )
    top_N = _integer_below(u_top_N, height_N - h_N + 1)
    left_N = _integer_below(u_left_N, width_N - w_N + 1)
    random_N4 = np.stack([top_N, left_N, h_N, w_N], axis=1)

    # 3: at least one pixel wide and high, which torchvision does not see to
    low, high = ratio
    image_ratio_N = width_N / height_N
    h_N = np.where(image_ratio_N < low, np.rint(width_N / low), height_N).clip(1).astype(np.int64)
    w_N = np.where(image_ratio_N > high, np.rint(height_N * high), width_N).clip(1).astype(np.int64)
    central_N4 = np.stack([(height_N - h_N) // 2, (width_N - w_N) // 2, h_N, w_N], axis=1)
    return np.where(fits_TN.any(axis=0)[:, None], random_N4, central_N4).astype(np.int32)


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


def _integer_below(u: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Uniform integers in [0, bound)."""
    return np.floor(u * bound).astype(np.int64)
