"""DALI's own distortions: close to PIL's where they can be, and nothing but what was drawn."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pipelines.augment.reference import distort_pixels_one
from pipelines.batch import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams
from pipelines.dali_distortions import distort, numbers_of

N, SIZE = 12, 61
# Mean absolute difference to PIL, in grey levels, and what 99.9 % of the values stay within: about 1.5 times
# what was measured. The pictures are a third noise, whose saturated colours are the worst case of the hue.
BOUNDS = {
    "flip": (0, 0),
    "brightness": (1, 1),
    "contrast": (1, 1),
    "saturation": (1, 1),
    "hue": (16, 125),
    "grayscale": (0.25, 1),
    "blur": (2.1, 39),
    "solarize": (0, 0),
}
RANGES = {
    "brightness": (0.6, 1.4),
    "contrast": (0.6, 1.4),
    "saturation": (0.8, 1.2),
    "hue": (-0.1, 0.1),
    "blur": (0.1, 2.0),
}


@pytest.fixture(scope="module")
def views_VNHWC() -> np.ndarray:  # noqa: N802 (the suffix is the shape)
    """Noise, smooth colours, and smooth colours with some noise."""
    random = np.random.default_rng(11)

    def smooth() -> np.ndarray:
        coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.BICUBIC))

    def make(kind: int) -> np.ndarray:
        if kind == 0:
            return random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        noise = random.normal(0, 8, (SIZE, SIZE, 3)) * (kind - 1)
        return (smooth() + noise).clip(0, 255).astype(np.uint8)

    return np.stack([make(number % 3) for number in range(2 * N)]).reshape(2, N, SIZE, SIZE, 3)


def neutral() -> ViewParams:
    zeros, ones, no = torch.zeros(2, N), torch.ones(2, N), torch.zeros(2, N, dtype=torch.bool)
    order_4 = torch.tensor([BRIGHTNESS, CONTRAST, SATURATION, HUE], dtype=torch.uint8)
    box_VN4 = torch.zeros(2, N, 4, dtype=torch.int32)
    return ViewParams(box_VN4, no, no, order_4.repeat(2, N, 1), ones, ones, ones, zeros, no, zeros, no)


def drawn(name: str, random: np.random.Generator) -> ViewParams:
    """Parameters with which every sample gets this distortion."""
    if name not in RANGES:
        return replace(neutral(), **{f"{name}_VN": torch.ones(2, N, dtype=torch.bool)})
    numbers_VN = torch.from_numpy(random.uniform(*RANGES[name], (2, N)).astype(np.float32))
    jitter_VN = torch.full((2, N), name != "blur")
    return replace(neutral(), jitter_VN=jitter_VN, **{f"{name}_VN": numbers_VN})


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def distorted(request, views_VNHWC) -> Callable[[ViewParams], np.ndarray]:
    """What DALI makes of the views on each device."""
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    fed = []

    @pipeline_def(enable_conditionals=True)
    def graph():
        a, b, numbers = fn.external_source(
            source=lambda: fed,
            num_outputs=3,
            dtype=[types.UINT8, types.UINT8, types.FLOAT],
            ndim=[3, 3, 2],
            layout=["HWC", "HWC", ""],
        )
        if request.param == "gpu":
            a, b = a.gpu(), b.gpu()
        return distort(a, numbers[0]), distort(b, numbers[1])

    device_id = 0 if request.param == "gpu" else None
    pipeline = graph(batch_size=N, num_threads=2, device_id=device_id, prefetch_queue_depth=1)

    def run(params: ViewParams) -> np.ndarray:
        fed[:] = [*map(list, views_VNHWC), numbers_of(params)]
        return np.stack([torch.from_dlpack(view.as_tensor()).cpu() for view in pipeline.run()])

    return run


def expected(views_VNHWC: np.ndarray, params: ViewParams) -> np.ndarray:
    pixels = [[distort_pixels_one(views_VNHWC[v, n], params, v, n) for n in range(N)] for v in range(2)]
    return np.array(pixels)


def difference(a_VNHWC: np.ndarray, b_VNHWC: np.ndarray) -> np.ndarray:
    return np.abs(a_VNHWC.astype(np.int64) - b_VNHWC)


@pytest.mark.parametrize("name", BOUNDS)
def test_each_distortion_is_as_close_to_pil_as_documented(name, distorted, views_VNHWC):
    params = drawn(name, np.random.default_rng(3))
    off_VNHWC = difference(distorted(params), expected(views_VNHWC, params))
    mean, most = BOUNDS[name]
    assert off_VNHWC.mean() <= mean
    assert np.percentile(off_VNHWC, 99.9) <= most


def test_sample_for_which_nothing_is_drawn_stays_as_it_is(distorted, views_VNHWC):
    assert np.array_equal(distorted(neutral()), views_VNHWC)


@pytest.mark.parametrize("name", BOUNDS)
def test_distortion_touches_only_the_samples_that_drew_it(name, distorted, views_VNHWC):
    random = np.random.default_rng(4)
    touched_VN = torch.from_numpy(random.random((2, N)) < 0.4)
    for_all, none = drawn(name, random), neutral()
    mixed = ViewParams(
        **{
            field: torch.where(touched_VN.reshape(2, N, *[1] * (value.ndim - 2)), value, vars(none)[field])
            for field, value in vars(for_all).items()
        }
    )
    ours_VNHWC = distorted(mixed)
    assert np.array_equal(ours_VNHWC[touched_VN], distorted(for_all)[touched_VN])
    assert np.array_equal(ours_VNHWC[~touched_VN], views_VNHWC[~touched_VN])
    changed_VN = (ours_VNHWC != views_VNHWC).any((2, 3, 4))
    assert np.array_equal(changed_VN, touched_VN.numpy())
