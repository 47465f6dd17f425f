"""The Triton kernels of the distortions: PIL's pixels, every one of them, on every GPU.

The tests marked `gpu` run on a GPU where there is one, and in Triton's interpreter in any case.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.augment import reference, torch_ops
from pipelines.augment.box_blur import BoxWeights, box_weights
from pipelines.batch import ViewParams
from pipelines.config import BOUNDS, AugmentConfig, ViewConfig
from pipelines.draw import draw_views

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GUARD = 64  # elements on either side of every buffer that nothing may write to
IN_LEVELS = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}  # the normalisation that leaves pixels as they are
NO_BLUR = ViewConfig(blur_p=0, jitter_p=1, solarize_p=0.3)
COLOURS = AugmentConfig(view_a=NO_BLUR, view_b=NO_BLUR, **IN_LEVELS)
# Every combination of flags is likely, and different reaches of the blur.
MIXED = AugmentConfig(
    view_a=ViewConfig(blur_p=0.7, solarize_p=0.5, grayscale_p=0.3),
    view_b=ViewConfig(blur_p=0.4, blur_sigma=(0.01, 2.6), solarize_p=0.5, jitter_p=0.5),
    **IN_LEVELS,
)
FULL_REACH = ViewConfig(blur_p=1, blur_sigma=(1.9, 2.0))
IN_PARTS = AugmentConfig(view_a=FULL_REACH, view_b=NO_BLUR, **IN_LEVELS)
WIDE = ViewConfig(blur_p=1, blur_sigma=(0.1, BOUNDS["blur_sigma"][1]))
WIDEST = AugmentConfig(view_a=WIDE, view_b=NO_BLUR, **IN_LEVELS)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Distort = Callable[[Tensor, ViewParams, AugmentConfig, torch.dtype], Tensor]


def make_views(num_samples: int, size: int) -> Tensor:
    """(2, N, S, S, 3) uint8: dark left halves, whose few levels give every kind of hue, and all levels."""
    rng = np.random.default_rng(size)
    views = rng.integers(0, 256, (2, num_samples, size, size, 3), dtype=np.uint8)
    views[..., : size // 2, :] %= 24
    return torch.from_numpy(views)


def draw(config: AugmentConfig, num_samples: int, seed: int = 0) -> ViewParams:
    sides = np.full(num_samples, 100)
    return draw_views(config.views, seed, 0, np.arange(num_samples), sides, sides)


def part(params: ViewParams, samples: slice) -> ViewParams:
    return ViewParams(**{f.name: getattr(params, f.name)[:, samples] for f in fields(params)})


def pixels_of_pil(views: Tensor, params: ViewParams) -> Tensor:
    """(2, N, 3, S, S) float32 whole numbers."""
    pixels = [
        [
            reference.distort_pixels_one(views[v, n].numpy(), params, v, n).transpose(2, 0, 1)
            for n in range(views.shape[1])
        ]
        for v in range(2)
    ]
    return torch.from_numpy(np.array(pixels)).float()


def distorted(
    distort: Distort,
    views: Tensor,
    params: ViewParams,
    config: AugmentConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """On `device` and back, with what holds for any result."""
    views, params = views.to(device), params.to(device)
    before = views.clone()
    batched = distort(views, params, config, dtype)
    assert torch.equal(views, before)
    assert batched.dtype == dtype
    for view in batched:
        assert view.is_contiguous(memory_format=torch.channels_last)
    return batched.cpu()


@pytest.fixture
def distort(monkeypatch: pytest.MonkeyPatch) -> Iterator[Distort]:
    """`fused.distort`, where unwritten memory is poisoned and writing beside it an error."""
    from pipelines.augment import fused

    buffers = []

    def guarded(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or like.dtype
        poison = float("nan") if dtype.is_floating_point else 0xAB
        buffers.append(torch.full((GUARD + like.numel() + GUARD,), poison, dtype=dtype, device=like.device))
        return buffers[-1][GUARD:-GUARD].view(like.shape)

    with monkeypatch.context() as patch:
        patch.setattr(fused, "torch", SimpleNamespace(**{**vars(torch), "empty_like": guarded}))
        yield fused.distort
    assert buffers
    for buffer in buffers:
        beside = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        untouched = beside.isnan() if buffer.is_floating_point() else beside == 0xAB
        assert untouched.all()


def test_every_kernel_in_the_interpreter(run_interpreted: Callable[[str], None]) -> None:
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "num_samples", "size", "lanes", "steps"),
    [
        (IN_PARTS, 1, 19, 16, 6),  # many strips and parts, in the middle of the image and at its edges
        (MIXED, 4, 17, 64, 128),
        (MIXED, 2, 8, 32, 128),
        (WIDEST, 1, 9, 32, 128),  # the blur reaches across the image
    ],
)
def test_pixels_are_those_of_pil(
    distort: Distort,
    monkeypatch: pytest.MonkeyPatch,
    kernel_device: torch.device,
    config: AugmentConfig,
    num_samples: int,
    size: int,
    lanes: int,
    steps: int,
) -> None:
    from pipelines.augment import kernels_blur

    monkeypatch.setattr(kernels_blur, "_BLUR_LANES", lanes)
    monkeypatch.setattr(kernels_blur, "_BLUR_STEPS", steps)
    params, views = draw(config, num_samples), make_views(num_samples, size)
    assert (params.blur_VN > 0).any()
    batched = distorted(distort, views, params, config, torch.float32, kernel_device)
    assert torch.equal(batched, pixels_of_pil(views, params))


@pytest.mark.gpu
def test_stripes_are_blurred_as_by_pil(distort: Distort, kernel_device: torch.device) -> None:
    sigma_N = torch.tensor([0.001, 0.3, 1.4142135, 1.4142136, 2.4494898])  # around steps of the radius
    num_samples, size = len(sigma_N), 9
    params = replace(draw(COLOURS, num_samples), blur_VN=sigma_N.expand(2, num_samples))
    stripes = 255 * (torch.arange(size) % 2)
    views = torch.stack([stripes[:, None].expand(size, size), stripes.expand(size, size)])
    views = views[:, None, :, :, None].expand(2, num_samples, size, size, 3).to(torch.uint8)
    config = AugmentConfig(view_a=ViewConfig(blur_sigma=(0.001, 2.45)), view_b=NO_BLUR, **IN_LEVELS)
    batched = distorted(distort, views, params, config, torch.float32, kernel_device)
    assert torch.equal(batched, pixels_of_pil(views, params))


@pytest.mark.gpu
def test_box_weights_are_those_of_torch(kernel_device: torch.device) -> None:
    from pipelines.augment import kernels_blur

    count = 12_345 if INTERPRETED else 12_345_678
    sigma_N = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 13
    radii = torch.arange(13.0, dtype=torch.float64)
    edges = (radii * (radii + 1)).sqrt().float()  # where the radius grows
    above, below = (torch.nextafter(edges, edges + sign) for sign in (1, -1))
    sigma_N = torch.cat([edges, above, below.clamp(min=0), sigma_N, 0.01 * sigma_N]).to(kernel_device)
    weights = BoxWeights(*(torch.full_like(sigma_N, 0xAB, dtype=torch.int32) for _ in range(3)))
    kernels_blur.box_weights(sigma_N, weights)
    for ours, expected in zip(weights, box_weights(sigma_N.cpu()), strict=True):
        assert torch.equal(ours.cpu(), expected)


@pytest.mark.gpu
def test_colours_are_those_of_pil_in_every_order(distort: Distort, kernel_device: torch.device) -> None:
    orders = torch.tensor(list(permutations(range(4))), dtype=torch.uint8).view(2, 12, 4)
    params, views = replace(draw(COLOURS, 12), order_VN4=orders), make_views(12, 17)
    batched = distorted(distort, views, params, COLOURS, torch.float32, kernel_device)
    assert torch.equal(batched, pixels_of_pil(views, params))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("hue_VN", (0, 1e-6, -0.003, 0.004, 0.1, -0.1, 0.5, -0.5)),
        ("contrast_VN", (0, 0.5, 0.999, 1, 1.001, 1.4, 2, 1.5)),
        ("brightness_VN", (0, 0.5, 0.999, 1, 1.001, 1.4, 2, 1.5)),
        ("saturation_VN", (0, 0.5, 0.999, 1, 1.001, 1.4, 2, 1.5)),
    ],
)
def test_colour_operations_are_those_of_pil_over_their_range(
    distort: Distort, kernel_device: torch.device, field: str, values: tuple[float, ...]
) -> None:
    params = replace(draw(COLOURS, 4), **{field: torch.tensor(values).view(2, 4)})
    views = make_views(4, 41)
    batched = distorted(distort, views, params, COLOURS, torch.float32, kernel_device)
    assert torch.equal(batched, pixels_of_pil(views, params))


@pytest.mark.gpu
def test_normalisation_is_that_of_torch_and_rounded_once(
    distort: Distort, kernel_device: torch.device
) -> None:
    config = MIXED.model_copy(update={"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.1)})
    params, views = draw(config, 1), make_views(1, 9)
    assert (params.blur_VN > 0).sum() == 1
    single = distorted(distort, views, params, config, torch.float32, kernel_device)
    expected = torch_ops.distort(views, params, config, torch.float32)
    torch.testing.assert_close(single, expected, rtol=0, atol=1e-6)
    half = distorted(distort, views, params, config, torch.float16, kernel_device)
    assert torch.equal(half, single.half())
    bfloat16 = distorted(distort, views, params, config, torch.bfloat16, kernel_device)
    if INTERPRETED:  # it cuts bits off where compiled code rounds
        torch.testing.assert_close(bfloat16.float(), single, rtol=2**-7, atol=0)
    else:
        assert torch.equal(bfloat16, single.bfloat16())


@pytest.mark.gpu
def test_sample_is_the_same_alone_and_in_strided_memory(
    distort: Distort, kernel_device: torch.device
) -> None:
    params, views = draw(MIXED, 4), make_views(4, 9)
    whole = distorted(distort, views, params, MIXED, torch.float32, kernel_device)
    params, views = params.to(kernel_device), views.to(kernel_device)
    for n in (0, 2):
        alone = slice(n, n + 1)
        single = distort(views[:, alone], part(params, alone), MIXED, torch.float32)
        assert torch.equal(single.cpu(), whole[:, alone])


@pytest.mark.gpu
def test_where_nothing_is_blurred_no_kernel_of_the_blur_runs(
    distort: Distort, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    from pipelines.augment import kernels_blur

    launches = []
    for name in ("box_weights", "blur_rows"):
        launch = getattr(kernels_blur, name)
        monkeypatch.setattr(
            kernels_blur, name, lambda *a, name=name, launch=launch: launches.append(name) or launch(*a)
        )
    views = make_views(2, 9)
    for config, expected in ((COLOURS, []), (IN_PARTS, ["box_weights", "blur_rows", "blur_rows"])):
        launches.clear()
        params = draw(config, 2)
        for dtype in (torch.float32, torch.float16):
            batched = distorted(distort, views, params, config, dtype, kernel_device)
            assert torch.equal(batched.float(), pixels_of_pil(views, params))
        assert launches == 2 * expected


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("config", "num_samples", "size"),
    [
        (AugmentConfig(**IN_LEVELS), 33, 224),
        (AugmentConfig(**IN_LEVELS), 1, 512),
        (MIXED, 9, 225),
        (WIDEST, 3, 65),
        (COLOURS, 64, 32),
    ],
)
def test_full_sized_pixels_are_those_of_pil(
    distort: Distort, config: AugmentConfig, num_samples: int, size: int
) -> None:
    params, views = draw(config, num_samples), make_views(num_samples, size)
    batched = distorted(distort, views, params, config, torch.float32, torch.device("cuda"))
    assert torch.equal(batched, pixels_of_pil(views, params))


@pytest.mark.gpu
@needs_cuda
def test_gpu_never_makes_the_host_wait(distort: Distort) -> None:
    config = AugmentConfig()
    params, views = draw(config, 5).to("cuda"), make_views(5, 33).cuda()
    expected = distort(views, params, config, torch.float16)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        batched = distort(views, params, config, torch.float16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batched, expected)
