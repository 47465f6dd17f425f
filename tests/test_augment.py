"""Every implementation of the distortions against PIL, bit for bit before the normalisation."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torchvision import transforms

import pipelines.augment
from pipelines.augment import IMPLEMENTATIONS, choose, torch_ops, why_not
from pipelines.augment.box_blur import box_reach, box_weights
from pipelines.augment.reference import crop_and_resize, distort_one, distort_pixels_one
from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig, ViewConfig
from pipelines.draw import draw_views
from pipelines.errors import DataError

NOTHING = {"flip_p": 0, "jitter_p": 0, "grayscale_p": 0, "blur_p": 0, "solarize_p": 0}
JITTER = ("brightness", "contrast", "saturation", "hue")
EVERYTHING = ViewConfig(blur_p=0.6, solarize_p=0.4, saturation=0.4, hue=0.3)
GRAY_LEVELS = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}  # a normalisation that leaves 0..255
TABLE = Path(pipelines.augment.__file__).with_name("README.md")
CPU = torch.device("cpu")
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


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


def adversarial_views(kind: str, num_samples: int, size: int) -> torch.Tensor:
    """(2, N, S, S, 3) uint8 of one of the kinds of `ADVERSARIAL`."""
    rng = np.random.default_rng(0)
    shape = 2, num_samples, size, size, 3
    pixel = np.arange(size)
    patterns = {
        "constant": lambda: rng.integers(0, 256, (2, num_samples, 1, 1, 3)),
        "gray": lambda: rng.integers(0, 256, (*shape[:-1], 1)),
        "noise": lambda: rng.integers(0, 256, shape),
        "saturated": lambda: rng.integers(0, 2, shape) * 255,
        "stripes": lambda: pixel[:, None] % 2 * 255,
        "checkerboard": lambda: (pixel[:, None, None] + pixel[:, None]) % 2 * 255,
    }
    return torch.from_numpy(np.broadcast_to(patterns[kind](), shape).astype(np.uint8))


ADVERSARIAL = ("constant", "gray", "noise", "saturated", "stripes", "checkerboard")


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> list[Image.Image]:
    archive = shared_data / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip("no photographs beside the checkout")
    with tarfile.open(archive) as tar:
        files = [m for m in tar.getmembers() if m.name.endswith(".JPEG")]
        return [Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB") for m in files]


def crop(images: list[Image.Image], size: int, config: AugmentConfig) -> tuple[torch.Tensor, ViewParams]:
    """Both views' crops of photographs, and the numbers drawn for them."""
    heights, widths = (np.array([getattr(i, side) for i in images]) for side in ("height", "width"))
    params = draw_views(config.views, 0, 0, np.arange(len(images)), heights, widths)
    crops = [
        [crop_and_resize(i, b, size) for i, b in zip(images, boxes, strict=True)] for boxes in params.box_VN4
    ]
    return torch.from_numpy(np.array(crops)), params


def by_pil(views_VNHWC: torch.Tensor, params: ViewParams) -> torch.Tensor:
    """uint8 (V, N, C, H, W): the reference, before the normalisation."""
    num_views, num_samples = views_VNHWC.shape[:2]
    pixels = [
        [distort_pixels_one(views_VNHWC[v, n].numpy(), params, v, n) for n in range(num_samples)]
        for v in range(num_views)
    ]
    return torch.from_numpy(np.array(pixels)).permute(0, 1, 4, 2, 3)


def cases() -> Iterator:
    """Every implementation on every device that it serves."""
    for name in IMPLEMENTATIONS:
        if not why_not(name, CPU):
            yield pytest.param((name, "cpu"), id=f"{name}-cpu")
        if name != "numba":
            yield pytest.param((name, "cuda"), id=f"{name}-cuda", marks=ON_GPU)


@pytest.fixture(params=cases())
def distort(request: pytest.FixtureRequest):
    """One implementation, from and to the CPU's memory."""
    name, device = request.param
    distort = IMPLEMENTATIONS[name]()

    def on_device(views, params, config, dtype=torch.float32):
        return distort(views.to(device), params.to(device), config, dtype).cpu()

    return on_device


def assert_same_pixels(actual: torch.Tensor, expected: torch.Tensor) -> None:
    different = actual != expected
    assert actual.shape == expected.shape
    assert not different.any(), (
        f"{different.sum()} of {different.numel()} differ, first at {different.nonzero()[0].tolist()}: "
        f"{actual[different][0]} instead of {expected[different][0]}"
    )


DISTORTIONS = [
    pytest.param(only(), id="nothing"),
    pytest.param(only(flip_p=0.5), id="flip"),
    pytest.param(jitter_only(brightness=1), id="brightness"),
    pytest.param(jitter_only(contrast=1), id="contrast"),
    pytest.param(jitter_only(saturation=1), id="saturation"),
    pytest.param(jitter_only(hue=0.5), id="hue"),
    pytest.param(jitter_only(hue=0.006), id="hue-less-than-a-step-or-one"),
    pytest.param(only(grayscale_p=0.5), id="grayscale"),
    pytest.param(only(blur_p=0.8), id="blur"),
    pytest.param(only(solarize_p=0.5), id="solarize"),
    pytest.param(AugmentConfig(view_b=EVERYTHING, **GRAY_LEVELS), id="all"),
]


@pytest.mark.parametrize("config", DISTORTIONS)
def test_pixels_are_pils_bit_for_bit(distort, config):
    params = draw(config, 21)
    views = make_views(21, 33)
    assert_same_pixels(distort(views, params, config), by_pil(views, params))
    for kind in ADVERSARIAL:
        views = adversarial_views(kind, 21, 19)
        assert_same_pixels(distort(views, params, config), by_pil(views, params))


@pytest.mark.parametrize("size", [5, 8, 31, 64, 97, 225])
def test_pixels_are_pils_at_any_size(distort, size):
    config = AugmentConfig(view_b=EVERYTHING, **GRAY_LEVELS)
    params = draw(config, 8, seed=size)
    for views in (make_views(8, size, seed=size), adversarial_views("noise", 8, size)):
        assert_same_pixels(distort(views, params, config), by_pil(views, params))


def test_pixels_of_photographs_are_pils(distort, photographs):
    config = AugmentConfig(view_b=EVERYTHING, **GRAY_LEVELS)
    views, params = crop(photographs[:30], 113, config)
    assert_same_pixels(distort(views, params, config), by_pil(views, params))


def around(sigma: float) -> list[float]:
    """The float32 numbers next to `sigma`."""
    nearest = np.float32(sigma)
    return [float(np.nextafter(nearest, side)) for side in (np.float32(0), nearest, np.float32(99))]


# The boxes grow by a pixel at the square root of 2, 6, 12, 20, ...
SIGMAS = [0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 1, 1.3, *around(2**0.5), 1.7, 2, *around(6**0.5), 3, 5, 8.5, 12]


@pytest.mark.parametrize("size", [5, 17, 70])
def test_a_blur_of_any_sigma_is_pils(distort, size):
    config = only(blur_p=1, blur_sigma=(0.01, 12))
    params = draw(config, len(SIGMAS))
    params = replace(params, blur_VN=torch.tensor([SIGMAS, SIGMAS[::-1]]))
    for kind in ADVERSARIAL:
        views = adversarial_views(kind, len(SIGMAS), size)
        assert_same_pixels(distort(views, params, config), by_pil(views, params))


@pytest.mark.parametrize("longer", ["view_a", "view_b"])
def test_a_blur_reaches_as_far_as_its_views_largest_sigma(distort, longer):
    shorter = {"view_a": "view_b", "view_b": "view_a"}[longer]
    nothing = NOTHING | {"blur_p": 1}
    views = {
        longer: ViewConfig(**nothing | {"blur_sigma": (2.6, 3)}),
        shorter: ViewConfig(**nothing | {"blur_sigma": (0.4, 0.9)}),
    }
    config = AugmentConfig(**views, **GRAY_LEVELS)
    params, views = draw(config, 5), adversarial_views("saturated", 5, 31)
    assert_same_pixels(distort(views, params, config), by_pil(views, params))


def test_the_boxes_are_those_of_pils_c_code():
    """Its steps one by one, in numpy's float32; for random sigmas, and for all where the boxes grow."""
    f = np.float32
    growing = (np.sqrt(np.arange(1, 40) * np.arange(2, 41)).astype(f).view(np.int32))[:, None]
    near = (growing + np.arange(-1000, 1000)).view(f)
    sigma = np.concatenate([near.ravel(), np.random.default_rng(0).uniform(0.01, 40, 10**6).astype(f)])
    variance = sigma * sigma / f(3)
    length = np.sqrt(12.0 * variance.astype(float) + 1.0).astype(f)
    whole = np.floor((length.astype(float) - 1.0) / 2.0).astype(f)
    part = (2 * whole + f(1)) * (whole * (whole + f(1)) - f(3) * variance)
    part /= f(6) * (variance - (whole + f(1)) * (whole + f(1)))
    radius = whole + part
    assert radius.dtype == np.float32
    inner = (f(2**24) / (radius * f(2) + f(1))).astype(np.uint32)
    outer = (np.uint32(2**24) - (2 * radius.astype(np.uint32) + np.uint32(1)) * inner) // np.uint32(2)
    ours = box_weights(torch.from_numpy(sigma))
    for actual, expected in zip(ours, (radius, inner, outer), strict=True):
        assert actual.dtype == torch.int32
        np.testing.assert_array_equal(actual.numpy(), expected.astype(np.int32))
    for s, r in zip(near[:, ::100].ravel().tolist(), ours.radius[: near.size : 100].tolist(), strict=True):
        assert r + 1 <= box_reach(s) <= r + 2
    assert [n.item() for n in box_weights(torch.tensor(0.0))] == [0, 2**24, 0]


def test_jitter_is_pils_in_every_order(distort):
    config = only(jitter_p=1, saturation=0.4, hue=0.3)
    orders = torch.tensor(list(permutations(range(4))), dtype=torch.uint8)
    params, views = draw(config, 24, seed=1), make_views(24, 15, seed=1)
    params = replace(params, order_VN4=torch.stack([orders, orders.flip(0)]))
    assert_same_pixels(distort(views, params, config), by_pil(views, params))


@pytest.mark.parametrize("name", ["contrast", "saturation"])
def test_blends_round_the_product_before_the_sum(distort, name):
    """A fused multiply-add gives another whole number in 0.5 % of the pairs of values at these factors."""
    config = jitter_only(**{name: 1})
    factors = torch.tensor([0.6, 0.66, 0.72, 0.8, 0.85, 0.92, 1.2, 1.25, 1.4, 0.0, 1.0, 2.0])
    params, views = draw(config, 24), adversarial_views("noise", 24, 43)
    views[:, ::2] //= 3  # means other than the middle of the range
    params = replace(params, **{f"{name}_VN": factors.repeat(2, 2)})
    assert_same_pixels(distort(views, params, config), by_pil(views, params))


def test_hue_of_every_colour_is_pils(distort):
    config = jitter_only(hue=0.5)
    colour = torch.arange(2**24, dtype=torch.int32)
    channels = [(colour >> bits & 255).to(torch.uint8) for bits in (16, 8, 0)]
    views = torch.stack(channels, dim=-1).view(2, 32, 512, 512, 3)
    params = draw(config, 32)
    shifts = torch.tensor([1e-9, -1e-9, 0.5, -0.5])  # the first two turn by no step, but round to HSV
    params.hue_VN[:, :2], params.hue_VN[:, 2:4] = shifts[:2], shifts[2:]
    assert_same_pixels(distort(views, params, config), by_pil(views, params))


def measured_distances(photographs: list[Image.Image]) -> dict[str, tuple[float, float, float]]:
    """By image and range of sigma: how far PIL's blur is from a Gaussian, in gray levels.

    The Gaussian is sampled at whole pixels, normalised and not rounded; edge pixels go on beyond the image.
    Mean, 99.9th percentile and largest of the absolute differences.
    """
    crops, _ = crop(photographs, 224, AugmentConfig())
    images = {"photographs": crops[0, :60]}
    images |= {kind: adversarial_views(kind, 60, 64)[0] for kind in ("stripes", "checkerboard")}
    rows = {}
    for name, views_NHWC in images.items():
        for low, high in ((0.1, 0.5), (0.5, 1.0), (1.0, 2.0)):
            differences = []
            for sigma, image in zip(np.linspace(low, high, 60).tolist(), views_NHWC.numpy(), strict=True):
                boxes = np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)), np.float64)
                gaussian = gaussian_filter(
                    image.astype(np.float64), sigma, truncate=8, mode="nearest", axes=(0, 1)
                )
                differences.append(np.abs(boxes - gaussian))
            d = np.array(differences)
            rows[f"{name}, {low} to {high}"] = d.mean(), np.quantile(d, 0.999), d.max()
    return rows


def test_the_table_holds_what_is_measured(photographs):
    measured = measured_distances(photographs)
    fresh = "".join(f"| {name} | {m:.2f} | {q:.1f} | {top:.1f} |\n" for name, (m, q, top) in measured.items())
    stated = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in measured:
            stated[cells[0]] = [float(cell) for cell in cells[1:]]
    assert stated.keys() == measured.keys(), f"{TABLE} lacks rows; measured now:\n{fresh}"
    for name, values in measured.items():
        # A tenth for what another decoder changes.
        assert values == pytest.approx(stated[name], rel=0.1, abs=0.06), f"{name}; measured now:\n{fresh}"


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


def by_reference(views_VNHWC: torch.Tensor, params: ViewParams, config: AugmentConfig) -> torch.Tensor:
    """float32 (V, N, C, H, W), normalised."""
    num_views, num_samples = views_VNHWC.shape[:2]
    images = [
        [distort_one(views_VNHWC[v, n].numpy(), params, v, n, config) for n in range(num_samples)]
        for v in range(num_views)
    ]
    return torch.stack([torch.stack(view) for view in images])


def test_output_is_normalised_with_the_configured_mean_and_deviation(distort):
    params, views = draw(AugmentConfig(), 5), adversarial_views("noise", 5, 33)
    for config in (AugmentConfig(), AugmentConfig(mean=(0.3, 0.5, 0.7), std=(0.2, 0.25, 0.3))):
        expected = by_reference(views, params, config)
        torch.testing.assert_close(distort(views, params, config), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_samples", [1, 3, 7])
def test_each_view_is_contiguous_channels_last_and_rounded_once(distort, dtype, num_samples):
    config = AugmentConfig()
    params, views = draw(config, num_samples), make_views(num_samples, 33)
    batched = distort(views, params, config, dtype)
    assert batched.shape == (2, num_samples, 3, 33, 33)
    assert batched.dtype == dtype
    for view in batched:
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batched, distort(views, params, config).to(dtype))


def test_an_empty_batch_stays_one(distort):
    config = AugmentConfig()
    views = torch.empty(2, 0, 9, 9, 3, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        batched = distort(views, draw(config, 0), config, dtype)
        assert (batched.shape, batched.dtype) == ((2, 0, 3, 9, 9), dtype)


def test_a_sample_looks_the_same_in_any_batch(distort, monkeypatch):
    """Also where the batch is worked off in parts."""
    config = AugmentConfig()
    params, views = draw(config, 7), make_views(7, 33)
    whole = distort(views, params, config)
    for n in range(7):
        alone = ViewParams(**{f.name: getattr(params, f.name)[:, n : n + 1] for f in fields(params)})
        assert torch.equal(distort(views[:, n : n + 1], alone, config)[:, 0], whole[:, n])
    for name in ("_CHUNK_PIXELS_CPU", "_CHUNK_PIXELS"):
        monkeypatch.setattr(torch_ops, name, 3 * 33 * 33)
    assert torch.equal(distort(views, params, config), whole)


def test_autocast_around_it_changes_nothing(distort):
    config = AugmentConfig()
    params, views = draw(config, 3), make_views(3, 33)
    expected = distort(views, params, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(distort(views, params, config), expected)


def test_input_stays_as_it_was(distort):
    config = AugmentConfig()
    params, views = draw(config, 3), make_views(3, 9)
    before = views.clone(), {f.name: getattr(params, f.name).clone() for f in fields(params)}
    distort(views, params, config)
    assert torch.equal(views, before[0])
    for name, value in before[1].items():
        assert torch.equal(getattr(params, name), value)


def test_an_accelerators_path_gives_the_same_pixels(monkeypatch):
    """The path of torch that leaves no sample out, run on the CPU."""
    config = AugmentConfig()
    params, views = draw(config, 32), make_views(32, 33)
    expected = torch_ops.distort(views, params, config, torch.float32)
    monkeypatch.setattr(torch_ops, "_SELECTING_DEVICES", set())
    assert torch.equal(torch_ops.distort(views, params, config, torch.float32), expected)


def test_an_accelerators_path_never_looks_at_the_numbers(monkeypatch):
    """On pretended CUDA tensors, any operation that would make the host wait for their values raises."""
    config = AugmentConfig()
    params = draw(config, 5)

    def pretended(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device="cuda")

    with FakeTensorMode():
        on_cuda = ViewParams(**{f.name: pretended(getattr(params, f.name)) for f in fields(params)})
        views = torch.empty(2, 5, 33, 33, 3, dtype=torch.uint8, device="cuda")
        batched = torch_ops.distort(views, on_cuda, config, torch.float16)
        assert batched.shape == (2, 5, 3, 33, 33)
        assert batched[0].is_contiguous(memory_format=torch.channels_last)
        monkeypatch.setattr(torch_ops, "_SELECTING_DEVICES", {"cuda"})  # the other path does look
        with pytest.raises(DynamicOutputShapeException):
            torch_ops.distort(views, on_cuda, config, torch.float16)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_never_waits_for_the_host(name):
    config = AugmentConfig()
    params, views = draw(config, 32).to("cuda"), make_views(32, 33).cuda()
    distort = IMPLEMENTATIONS[name]()
    distort(views, params, config, torch.float16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        distort(views, params, config, torch.float16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_torch_compiles_as_one_graph():
    """Traced only: it takes long to compile."""
    config = AugmentConfig(view_b=EVERYTHING)
    params, views = draw(config, 5), make_views(5, 17)
    compiled = torch.compile(torch_ops.distort, fullgraph=True, backend="aot_eager")
    expected = torch_ops.distort(views, params, config, torch.float32)
    assert torch.equal(compiled(views, params, config, torch.float32), expected)


def test_compiled_operations_give_the_same_pixels():
    """Compilers may contract or reorder what the formulas compute, or round a division otherwise."""
    random = torch.Generator().manual_seed(0)
    x_NCHW = torch.randint(0, 256, (6, 3, 33, 33), generator=random).float()
    hue_N = torch.rand(6, generator=random) - 0.5
    factor_N, operation_N = torch.tensor([0.6, 0.8, 0.85, 1.2, 1.25, 0.66]), torch.arange(6) % 3
    sigma_N = torch.tensor([0, 0.1, 0.7, 1.3, 1.5, 2])
    for operation, *numbers in (
        (torch_ops.blend, operation_N, factor_N),
        (torch_ops.shift_hue, hue_N),
        (torch_ops.box_blur, sigma_N, 2.0),
    ):
        compiled = torch.compile(operation, fullgraph=True)
        assert torch.equal(compiled(x_NCHW, *numbers), operation(x_NCHW, *numbers))


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    choose.cache_clear()
    yield
    choose.cache_clear()


def test_auto_suits_the_device(fresh_choice, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(pipelines.augment, "_start_triton", lambda: None)
    assert choose("auto", CPU) == "numba"
    assert choose("auto", gpu) == "triton"
    assert choose("auto", torch.device("meta")) == "torch"
    assert choose("torch", gpu) == "torch"


@pytest.mark.parametrize("lacks", ["package", "capability", "compiler"])
def test_auto_falls_back_on_torch_and_says_so_once(fresh_choice, monkeypatch, lacks, caplog):
    def fail() -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    capability = (6, 1) if lacks == "capability" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(pipelines.augment, "_start_triton", fail)
    if lacks == "package":
        monkeypatch.setattr(pipelines.augment, "find_spec", lambda name: None)
    for _ in range(2):
        assert choose("auto", torch.device("cuda", 0)) == "torch"
    reason = {
        "package": "needs the package triton, which is not installed",
        "capability": "needs a GPU of compute capability 7.0 or newer",
        "compiler": "does not start (Failed to find C compiler.)",
    }[lacks]
    assert caplog.messages == [f"The slower torch distorts the views, since triton {reason}."]


@pytest.mark.parametrize(("name", "device"), [("triton", "cpu"), ("numba", "meta")])
def test_an_implementation_that_cannot_serve_the_device_is_refused(name, device):
    config = AugmentConfig(implementation=name)
    views = torch.empty(2, 3, 9, 9, 3, dtype=torch.uint8, device=device)
    message = (
        f"data.augment.implementation {name} serves .* only, but the views are on {device}; choose auto."
    )
    with pytest.raises(DataError, match=message):
        pipelines.augment.distort(views, draw(config, 3), config, torch.float32)


@pytest.mark.parametrize("name", ["auto", "torch", "numba"])
def test_the_configured_implementation_distorts(name, monkeypatch):
    config = AugmentConfig(implementation=name)
    used = []
    for entry, load in list(IMPLEMENTATIONS.items()):
        monkeypatch.setitem(
            IMPLEMENTATIONS, entry, lambda entry=entry, load=load: used.append(entry) or load()
        )
    params, views = draw(config, 3), make_views(3, 9)
    batched = pipelines.augment.distort(views, params, config, torch.float32)
    assert used == ["numba" if name == "auto" else name]
    torch.testing.assert_close(batched, by_reference(views, params, config), rtol=0, atol=1e-6)
    widened = pipelines.augment.distort(views, params, config, torch.float64)
    assert widened.dtype == torch.float64 and widened.stride() == batched.stride()
    assert torch.equal(widened, batched.double())
