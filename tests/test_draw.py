"""Numbers depend on (seed, epoch, index, view) alone, and each crop is torchvision's."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig, ViewConfig
from pipelines.draw import draw_views
from pipelines.draw_formulas import CROP_TRIES, exp
from pipelines.random_bits import philox_u32, uniform

CONFIG = AugmentConfig()
NAMES = [f.name for f in fields(ViewParams)]
ODD_SIZES = [
    (500, 1),
    (1, 500),
    (2, 500),
    (500, 5),
    (3, 3),
    (1, 1),
    (2, 5),
    (375, 500),
    (1200, 400),
    (33, 32),
]


def draw(num_samples=1000, config=CONFIG, seed=0, epoch=0, height=375, width=500):
    sizes = np.full(num_samples, height), np.full(num_samples, width)
    return draw_views(config.views, seed, epoch, np.arange(num_samples), *sizes)


def both_views(**settings):
    return AugmentConfig(view_a=ViewConfig(**settings), view_b=ViewConfig(**settings))


def test_dtypes_and_shapes_are_those_of_the_contract():
    params = draw(5)
    for name in NAMES:
        value = getattr(params, name)
        assert value.shape == ((2, 5, 4) if name.endswith("VN4") else (2, 5)), name
        assert value.is_contiguous(), name  # DALI takes no others
    assert params.box_VN4.dtype == torch.int32
    assert params.order_VN4.dtype == torch.uint8
    for name in ("flip_VN", "jitter_VN", "grayscale_VN", "solarize_VN"):
        assert getattr(params, name).dtype == torch.bool
    for name in ("brightness_VN", "contrast_VN", "saturation_VN", "hue_VN", "blur_VN"):
        assert getattr(params, name).dtype == torch.float32


def test_a_sample_gets_the_same_numbers_in_any_batch_and_place():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 600, 200), rng.integers(1, 600, 200)
    whole = draw_views(CONFIG.views, 3, 7, np.arange(200), heights, widths)
    for batch in (rng.permutation(200), np.array([150, 3]), np.array([42])):
        part = draw_views(CONFIG.views, 3, 7, batch, heights[batch], widths[batch])
        for name in NAMES:
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, batch]), name


def test_seeds_epochs_views_and_samples_get_different_numbers():
    """Of continuous numbers on 1,000 samples, hardly any may coincide."""
    config = both_views(jitter_p=1, blur_p=1)
    base = draw(config=config)
    for name in ("brightness_VN", "contrast_VN", "saturation_VN", "hue_VN", "blur_VN"):
        a_N, b_N = getattr(base, name)
        others = [
            b_N,
            a_N.roll(1),
            getattr(draw(config=config, seed=1), name)[0],
            getattr(draw(config=config, seed=2**32), name)[0],
            getattr(draw(config=config, epoch=1), name)[0],
        ]
        for other_N in others:
            assert (a_N == other_N).sum() <= 3, name
            correlation = torch.corrcoef(torch.stack([a_N, other_N]))[0, 1]
            assert abs(correlation) < 0.15, name  # 4.7 standard deviations
    assert (base.box_VN4[0] == base.box_VN4[1]).all(dim=1).sum() <= 3


def test_what_a_sample_does_not_get_is_stored_as_its_identity():
    params = draw(2000)
    off = ~params.jitter_VN
    assert 0 < off.sum() < off.numel()
    for name, identity in {"brightness_VN": 1, "contrast_VN": 1, "saturation_VN": 1, "hue_VN": 0}.items():
        assert (getattr(params, name)[off] == identity).all(), name
        assert (getattr(params, name)[~off] != identity).float().mean() > 0.99, name
    assert (params.order_VN4[off] == torch.arange(4)).all()
    assert set(params.blur_VN[1].unique().tolist()) > {0.0}


def crop_by_the_book(height, width, scale, ratio, u_4T):
    """torchvision's `RandomResizedCrop.get_params`, statement by statement, with the uniforms handed in."""
    area = height * width
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio, u_top, u_left in u_4T.T:
        target_area = area * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect_ratio = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u_ratio)
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w], True
    in_ratio = width / height
    if in_ratio < min(ratio):
        w = width
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        h = height
        w = round(h * max(ratio))
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w], False


@pytest.mark.parametrize(("height", "width"), ODD_SIZES)
def test_crops_are_torchvisions(height, width):
    num_samples = 200
    views = ViewConfig(), ViewConfig(crop_scale=(0.3, 0.9), crop_ratio=(0.5, 3.0))
    sizes = np.full(num_samples, height), np.full(num_samples, width)
    box_VN4 = draw_views(views, 5, 2, np.arange(num_samples), *sizes).box_VN4
    for v, view in enumerate(views):
        for n in range(num_samples):
            u_4T = uniform(philox_u32(5, n, 2, v, np.arange(CROP_TRIES)))
            expected, _ = crop_by_the_book(height, width, view.crop_scale, view.crop_ratio, u_4T)
            assert box_VN4[v, n].tolist() == expected


def test_odd_sizes_reach_both_the_random_and_the_central_crop():
    """Otherwise the test above would not see the fallback."""
    found = {}
    for height, width in ODD_SIZES:
        tries = [uniform(philox_u32(5, n, 2, 0, np.arange(CROP_TRIES))) for n in range(200)]
        drawn = [crop_by_the_book(height, width, (0.08, 1.0), (3 / 4, 4 / 3), u_4T)[1] for u_4T in tries]
        found[height, width] = {*drawn}
    assert found[500, 1] == found[1, 500] == {False}
    assert found[375, 500] == {True}
    assert {True, False} in found.values()


def test_crops_stay_inside_images_of_any_size():
    rng = np.random.default_rng(1)
    heights, widths = (np.exp(rng.uniform(0, 8, 5000)).astype(np.int32) for _ in range(2))
    narrow = ViewConfig(crop_ratio=(0.1, 0.3))
    box_VN4 = draw_views((ViewConfig(), narrow), 0, 0, np.arange(5000), heights, widths).box_VN4.numpy()
    top, left, height, width = np.moveaxis(box_VN4, -1, 0)
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()


def test_exp_is_the_exponential_function():
    for reach, error in ((1, 1e-14), (14, 2e-13)):
        x = np.linspace(-reach, reach, 20_001)
        np.testing.assert_allclose(exp(x), np.exp(x), rtol=error)
