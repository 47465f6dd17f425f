"""The batched distortions against PIL and torchvision, one operation at a time and all together."""

import io
import math
import tarfile
from dataclasses import fields, replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image, ImageFilter
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torchvision import transforms

from pipelines.augment import torch_ops
from pipelines.augment.reference import crop_and_resize, distort_one
from pipelines.augment.torch_ops import distort
from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig, ViewConfig
from pipelines.draw import draw_views

NOTHING = {"flip_p": 0, "jitter_p": 0, "grayscale_p": 0, "blur_p": 0, "solarize_p": 0}
JITTER = ("brightness", "contrast", "saturation", "hue")
GRAY_LEVELS = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}  # a normalisation that leaves 0..255


def only(**settings) -> AugmentConfig:
    """Both views with these distortions and no others, in gray levels."""
    view = ViewConfig(**NOTHING | settings)
    return AugmentConfig(view_a=view, view_b=view, **GRAY_LEVELS)


def jitter_only(**strengths) -> AugmentConfig:
    return only(jitter_p=1, **dict.fromkeys(JITTER, 0) | strengths)


def draw(config: AugmentConfig, num_samples: int, seed: int = 0) -> ViewParams:
    size = np.full(num_samples, 100)
    return draw_views(config.views, seed, 0, np.arange(num_samples), size, size)


def make_views(num_samples: int, size: int, seed: int = 0) -> torch.Tensor:
    """(2, N, S, S, 3) uint8: soft coloured shapes, hard edges and a little noise, over the whole range."""
    rng = np.random.default_rng(seed)
    views = np.empty((2, num_samples, size, size, 3), np.uint8)
    for image in views.reshape(-1, size, size, 3):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float64)
        top, left = rng.integers(0, size // 2, 2)
        soft[top : top + size // 3, left : left + size // 3] = rng.integers(0, 256, 3)
        image[:] = (soft + rng.normal(0, 4, soft.shape)).round().clip(0, 255)
    return torch.from_numpy(views)


def reference(views_VNHWC: torch.Tensor, params: ViewParams, config: AugmentConfig) -> torch.Tensor:
    num_views, num_samples = views_VNHWC.shape[:2]
    return torch.stack(
        [
            torch.stack(
                [distort_one(views_VNHWC[v, n].numpy(), params, v, n, config) for n in range(num_samples)]
            )
            for v in range(num_views)
        ]
    )


# Measured on 5 seeds of 2 x 16 images, mean and largest, in gray levels; where they come from:
# - PIL cuts off the fraction after each blend: half a level on average, one at most, and that three times;
# - PIL holds the hue in 8 bits and cuts off its shift: up to two steps of 6 levels in a saturated image;
# - PIL's Gaussian blur is three box blurs, rounded after each, each with its own edge (see `gaussian_blur`).
@pytest.mark.parametrize(
    ("config", "mean", "largest"),
    [
        pytest.param(only(), 1e-4, 1e-4, id="nothing"),
        pytest.param(only(flip_p=1), 1e-4, 1e-4, id="flip"),
        pytest.param(only(solarize_p=1), 1e-4, 1e-4, id="solarize"),
        pytest.param(only(grayscale_p=1), 0.26, 0.51, id="grayscale"),  # measured 0.25, 0.50
        pytest.param(jitter_only(brightness=0.4), 0.5, 1.01, id="brightness"),  # 0.47, 1.00
        pytest.param(jitter_only(contrast=0.4), 0.5, 1.25, id="contrast"),  # 0.47, 1.17
        pytest.param(jitter_only(saturation=0.4), 0.5, 1.25, id="saturation"),  # 0.48, 1.19
        pytest.param(jitter_only(hue=0.1), 0.8, 18, id="hue"),  # 0.67, 16.0
        pytest.param(only(jitter_p=1), 1.7, 20, id="jitter"),  # 1.52, 18.1
        pytest.param(only(blur_p=1), 0.6, 42, id="blur"),  # 0.48, 39.7
        pytest.param(AugmentConfig(**GRAY_LEVELS), 1.4, 42, id="all"),  # 1.30, 40.5
    ],
)
def test_batched_distortions_stay_close_to_pil(config, mean, largest):
    params = draw(config, 16)
    views = make_views(16, 33)
    difference = (distort(views, params, config, torch.float32) - reference(views, params, config)).abs()
    assert difference.mean() <= mean
    assert difference.max() <= largest


def test_batched_distortions_stay_close_to_pil_on_photographs(shared_data):
    """Measured on 60 photographs at 224 pixels: mean 1.14 (0.94 of it PIL's cut-off), 99.9 % within 7.2."""
    archive = shared_data / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip("no photographs beside the checkout")
    with tarfile.open(archive) as tar:
        files = [m for m in tar.getmembers() if m.name.endswith(".JPEG")][:12]
        images = [Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB") for m in files]
    config = AugmentConfig(**GRAY_LEVELS)
    heights, widths = (np.array([getattr(i, side) for i in images]) for side in ("height", "width"))
    params = draw_views(config.views, 0, 0, np.arange(12), heights, widths)
    crops = [
        [crop_and_resize(i, b, 113) for i, b in zip(images, boxes, strict=True)] for boxes in params.box_VN4
    ]
    views = torch.from_numpy(np.array(crops))
    difference = (distort(views, params, config, torch.float32) - reference(views, params, config)).abs()
    assert difference.mean() <= 1.4
    assert (difference > 12).float().mean() <= 1e-3


def floats(view_HWC: torch.Tensor) -> torch.Tensor:
    """Float64 (C, H, W) in 0..1, in which torchvision's operations do not round."""
    return view_HWC.permute(2, 0, 1).double() / 255


def jitter_by_torchvision(view_HWC: torch.Tensor, params: ViewParams, v: int, n: int) -> torch.Tensor:
    image = floats(view_HWC)
    for which in params.order_VN4[v, n].tolist():
        operation = getattr(tv, f"adjust_{JITTER[which]}")
        number = getattr(params, f"{JITTER[which]}_VN")[v, n].item()
        if number != (0 if operation is tv.adjust_hue else 1):  # ColorJitter too leaves these out
            image = operation(image, number)
    return image * 255


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        # torchvision's luma weighs red by 0.2989 where PIL and we take 0.299: 0.03 levels times 0.4.
        pytest.param(jitter_only(brightness=0.4), 1e-4, id="brightness"),
        pytest.param(jitter_only(contrast=0.4), 0.012, id="contrast"),
        pytest.param(jitter_only(saturation=0.4), 0.012, id="saturation"),
        pytest.param(jitter_only(hue=0.5), 1e-3, id="hue"),
        pytest.param(only(jitter_p=1, saturation=0.4), 0.05, id="all"),
    ],
)
@pytest.mark.parametrize("num_samples", [1, 3, 24])
def test_jitter_is_torchvisions_in_every_order(config, tolerance, num_samples):
    orders = torch.tensor(list(permutations(range(4))), dtype=torch.uint8)
    params, views = draw(config, num_samples, seed=1), make_views(num_samples, 9, seed=1)
    params = replace(params, order_VN4=torch.stack([orders, orders.flip(0)])[:, :num_samples])
    batched = distort(views, params, config, torch.float32)
    for v in range(2):
        for n in range(num_samples):
            expected = jitter_by_torchvision(views[v, n], params, v, n)
            torch.testing.assert_close(batched[v, n].double(), expected, rtol=0, atol=tolerance)


def test_jitter_leaves_flat_colours_without_hue_alone():
    """Gray, black and white pixels have no hue; turning it must not make one, nor a NaN."""
    config = jitter_only(hue=0.5)
    views = torch.tensor([0, 1, 127, 255], dtype=torch.uint8).view(1, 4, 1, 1, 1).expand(2, 4, 8, 8, 3)
    batched = distort(views, draw(config, 4), config, torch.float32)
    torch.testing.assert_close(batched, views.permute(0, 1, 4, 2, 3).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "max_sigma"), [(33, 2.0), (8, 2.0), (15, 0.5)])
def test_blur_is_a_sampled_gaussian_with_extended_edges(size, max_sigma):
    config = only(blur_p=1, blur_sigma=(0.1, max_sigma))
    params, views = draw(config, 7), make_views(7, size)
    batched = distort(views, params, config, torch.float32)
    reach = math.ceil(4 * max_sigma)
    for v in range(2):
        for n in range(7):
            padded = torch.nn.functional.pad(floats(views[v, n])[None], [reach] * 4, mode="replicate")
            blurred = tv.gaussian_blur(padded, 2 * reach + 1, params.blur_VN[v, n].item())
            expected = blurred[0, :, reach:-reach, reach:-reach] * 255
            torch.testing.assert_close(batched[v, n].double(), expected, rtol=0, atol=1e-3)


def test_reference_is_the_authors_transform(monkeypatch):
    """The same numbers through torchvision's transform classes, composed as in the authors' code."""
    config = AugmentConfig()
    params, views = draw(config, 12), make_views(12, 33)
    for v, view in enumerate(config.views):
        for n in range(12):
            numbers = [getattr(params, f"{name}_VN")[v, n].item() for name in JITTER]
            monkeypatch.setattr(
                transforms.ColorJitter,
                "get_params",
                lambda *ranges, drawn=(params.order_VN4[v, n], *numbers): drawn,
            )
            colour = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
            sigma = params.blur_VN[v, n].item()
            composed = transforms.Compose(
                [
                    transforms.RandomHorizontalFlip(float(params.flip_VN[v, n])),
                    transforms.RandomApply([colour], float(params.jitter_VN[v, n])),
                    transforms.RandomGrayscale(float(params.grayscale_VN[v, n])),
                    lambda x, s=sigma: x.filter(ImageFilter.GaussianBlur(s)) if s else x,
                    transforms.RandomSolarize(128, float(params.solarize_VN[v, n])),
                    transforms.ToTensor(),
                    transforms.Normalize(config.mean, config.std),
                ]
            )
            image = views[v, n].numpy()
            expected = composed(Image.fromarray(image))
            torch.testing.assert_close(distort_one(image, params, v, n, config), expected, rtol=0, atol=1e-6)


def test_crop_and_resize_is_pils_bicubic_of_the_cropped_image():
    image = Image.fromarray(make_views(1, 97)[0, 0].numpy()).resize((120, 97))
    for top, left, height, width in [(0, 0, 97, 120), (90, 3, 7, 111), (5, 119, 80, 1), (96, 0, 1, 1)]:
        cropped = image.crop((left, top, left + width, top + height))
        expected = np.asarray(cropped.resize((33, 33), Image.Resampling.BICUBIC))
        ours = crop_and_resize(image, torch.tensor([top, left, height, width]), 33)
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, expected)


def test_output_is_normalised_with_the_configured_mean_and_deviation():
    view = ViewConfig(**NOTHING)
    config = AugmentConfig(view_a=view, view_b=view)
    params, views = draw(config, 3), make_views(3, 9)
    batched = distort(views, params, config, torch.float32)
    torch.testing.assert_close(batched, reference(views, params, config), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_samples", [1, 3, 7])
def test_each_view_is_contiguous_channels_last_and_rounded_once(dtype, num_samples):
    config = AugmentConfig()
    params, views = draw(config, num_samples), make_views(num_samples, 33)
    batched = distort(views, params, config, dtype)
    assert batched.shape == (2, num_samples, 3, 33, 33)
    assert batched.dtype == dtype
    for view in batched:
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batched, distort(views, params, config, torch.float32).to(dtype))


def test_a_sample_looks_the_same_in_any_batch(monkeypatch):
    """Also where the batch is worked off in parts."""
    config = AugmentConfig()
    params, views = draw(config, 7), make_views(7, 33)
    whole = distort(views, params, config, torch.float32)
    for n in range(7):
        alone = ViewParams(**{f.name: getattr(params, f.name)[:, n : n + 1] for f in fields(params)})
        single = distort(views[:, n : n + 1], alone, config, torch.float32)
        torch.testing.assert_close(single[:, 0], whole[:, n], rtol=0, atol=1e-5)
    monkeypatch.setattr(torch_ops, "_CHUNK_PIXELS_CPU", 3 * 33 * 33)
    torch.testing.assert_close(distort(views, params, config, torch.float32), whole, rtol=0, atol=1e-5)


def test_autocast_around_it_does_not_blur_in_half_precision():
    config = AugmentConfig()
    params, views = draw(config, 3), make_views(3, 33)
    expected = distort(views, params, config, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distort(views, params, config, torch.float32), expected)


def test_input_stays_as_it_was():
    config = AugmentConfig()
    params, views = draw(config, 3), make_views(3, 9)
    before = views.clone(), {f.name: getattr(params, f.name).clone() for f in fields(params)}
    distort(views, params, config, torch.float32)
    assert torch.equal(views, before[0])
    for name, value in before[1].items():
        assert torch.equal(getattr(params, name), value)


def test_an_accelerators_path_gives_the_same_pixels(monkeypatch):
    """The path that leaves no sample out, run on the CPU."""
    config = AugmentConfig()
    params, views = draw(config, 32), make_views(32, 33)
    expected = distort(views, params, config, torch.float32)
    monkeypatch.setattr(torch_ops, "_SELECTING_DEVICES", set())
    torch.testing.assert_close(distort(views, params, config, torch.float32), expected, rtol=0, atol=1e-5)


def test_an_accelerators_path_never_looks_at_the_numbers(monkeypatch):
    """On pretended CUDA tensors, any operation that would make the host wait for their values raises."""
    config = AugmentConfig()
    params = draw(config, 5)

    def pretended(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device="cuda")

    torch_ops._normalisation.cache_clear()
    try:
        with FakeTensorMode():
            on_cuda = ViewParams(**{f.name: pretended(getattr(params, f.name)) for f in fields(params)})
            views = torch.empty(2, 5, 33, 33, 3, dtype=torch.uint8, device="cuda")
            batched = distort(views, on_cuda, config, torch.float16)
            assert batched.shape == (2, 5, 3, 33, 33)
            assert batched[0].is_contiguous(memory_format=torch.channels_last)
            monkeypatch.setattr(torch_ops, "_SELECTING_DEVICES", {"cuda"})  # the other path does look
            with pytest.raises(DynamicOutputShapeException):
                distort(views, on_cuda, config, torch.float16)
    finally:
        torch_ops._normalisation.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_cpus_pixels_without_waiting_for_the_host():
    config = AugmentConfig(**GRAY_LEVELS)
    params, views = draw(config, 32), make_views(32, 33)
    on_gpu = views.cuda(), params.to("cuda"), config, torch.float32
    distort(*on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batched = distort(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(
        batched.cpu(), distort(views, params, config, torch.float32), rtol=0, atol=0.01
    )
