"""All the randomness of the distortions: pure functions of (seed, epoch, sample index, view).

Numbers come from a counter-based generator whose counter is (sample index, epoch, view, block), so what a
sample gets does not depend on its batch, its place in it, the rank, the worker or the loader. Each block
gives four uniform numbers.

Shape legend: V views (2), N samples, T tries of the crop, B blocks, K the four words of a block.
"""

import numpy as np
import torch

from pipelines.batch import ViewParams
from pipelines.config import ViewConfig
from pipelines.draw_formulas import (
    BLOCK_BLUR_AND_ORDER,
    BLOCK_COLOUR,
    BLOCK_SWITCHES,
    CROP_TRIES,
    NUM_BLOCKS,
    ORDERS,
    ViewSpec,
    central_crop,
    crop_fits,
    crop_size,
    distortions,
    place_crop,
    view_spec,
)
from pipelines.random_bits import philox_u32, uniform


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
        _draw_view(view_spec(config), view, seed, epoch, indices_N, heights_N, widths_N)
        for view, config in enumerate(views)
    ]
    return ViewParams(**{name: torch.from_numpy(np.stack([d[name] for d in drawn])) for name in drawn[0]})


def _draw_view(
    spec: ViewSpec,
    view: int,
    seed: int,
    epoch: int,
    indices_N: np.ndarray,
    heights_N: np.ndarray,
    widths_N: np.ndarray,
) -> dict[str, np.ndarray]:
    """One view's numbers, under the names of the fields of `ViewParams`."""
    u_KBN = uniform(philox_u32(seed, indices_N, epoch, view, np.arange(NUM_BLOCKS)[:, None]))
    drawn = distortions(
        spec, u_KBN[:, BLOCK_SWITCHES], u_KBN[:, BLOCK_COLOUR], u_KBN[:, BLOCK_BLUR_AND_ORDER]
    )
    return {
        "box_VN4": random_resized_crop(spec, u_KBN[:, :CROP_TRIES], heights_N, widths_N),
        "flip_VN": drawn.flip,
        "jitter_VN": drawn.jitter,
        "order_VN4": ORDERS[drawn.order.astype(np.int64)],
        "brightness_VN": drawn.brightness.astype(np.float32),
        "contrast_VN": drawn.contrast.astype(np.float32),
        "saturation_VN": drawn.saturation.astype(np.float32),
        "hue_VN": drawn.hue.astype(np.float32),
        "grayscale_VN": drawn.grayscale,
        "blur_VN": drawn.blur.astype(np.float32),
        "solarize_VN": drawn.solarize,
    }


def random_resized_crop(
    spec: ViewSpec, u_4TN: np.ndarray, heights_N: np.ndarray, widths_N: np.ndarray
) -> np.ndarray:
    """int32 boxes of shape (N, 4) as top, left, height, width: torchvision's `RandomResizedCrop`.

    `u_4TN` holds uniform numbers in [0, 1) for the area, aspect ratio, top and left of each try.

    1. T tries: an area uniform in `crop_scale` of the image's, a width / height log-uniform in `crop_ratio`.
    2. The first try that fits into the image is taken, at a uniform place.
    3. Where none fits: the largest central crop whose aspect ratio lies in `crop_ratio`.
    """
    height_N, width_N = np.asarray(heights_N, dtype=np.float64), np.asarray(widths_N, dtype=np.float64)
    u_area_TN, u_ratio_TN, u_top_TN, u_left_TN = u_4TN

    h_TN, w_TN = crop_size(spec, u_area_TN, u_ratio_TN, height_N, width_N)  # 1

    fits_TN = crop_fits(h_TN, w_TN, height_N, width_N)  # 2
    first_1N = fits_TN.argmax(axis=0)[None]
    of_first = (np.take_along_axis(a_TN, first_1N, axis=0)[0] for a_TN in (u_top_TN, u_left_TN, h_TN, w_TN))
    random_N4 = np.stack(place_crop(*of_first, height_N, width_N), axis=1)

    central_N4 = np.stack(central_crop(spec, height_N, width_N), axis=1)  # 3
    return np.where(fits_TN.any(axis=0)[:, None], random_N4, central_N4).astype(np.int32)
