"""Similarity of an image and its distorted self, for encoders of which one knows what they ignore."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from eval.audit.distortions import DISTORTIONS, crop
from eval.audit.invariance import Invariance, measure_invariance
from eval.audit.sample import Encoder
from eval.config import FeaturesConfig
from model.weights import Normalisation
from pipelines.errors import DataError
from pipelines.source import FolderSource

SIZE = 16
CONFIG = FeaturesConfig(image_size=SIZE, resize=20, batch_size=7, workers=0)
PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IMAGES = range(0, 24, 2)


class Pixels(nn.Module):
    def forward(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.flatten(1)


class MeanColour(nn.Module):
    """Ignores where things are."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def source(image_folder: Path) -> FolderSource:
    return FolderSource(image_folder)


def measure(backbone: nn.Module, source: FolderSource, names: set[str], seed: int = 0) -> Invariance:
    kinds = [each for each in DISTORTIONS if each.name in names]
    return measure_invariance(
        Encoder(backbone, PLAIN, CONFIG), source, IMAGES, torch.device("cpu"), seed, None, kinds
    )


def crops(source: FolderSource) -> list[Image.Image]:
    """The centre crops with torchvision's own classes."""
    from torchvision.transforms import CenterCrop, Compose, Resize

    see = Compose([Resize(20), CenterCrop(SIZE)])
    return [see(Image.open(source.name(index)).convert("RGB")) for index in IMAGES]


def cosines(images: list[Image.Image], others: list[Image.Image]) -> np.ndarray:
    x, y = (np.stack([np.asarray(image, float).ravel() for image in each]) for each in (images, others))
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


def test_figures_are_cosines_of_the_pixels_an_encoder_of_pixels_sees(source: FolderSource) -> None:
    found = measure(Pixels(), source, {"flip", "blur"})
    plain = crops(source)
    flip, blur = found.curves
    expected = cosines(plain, [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in plain])
    assert flip.similarities[0].mean == pytest.approx(expected.mean(), abs=1e-5)
    assert (flip.similarities[0].p10, flip.similarities[0].p90) == pytest.approx(
        tuple(np.quantile(expected, [0.1, 0.9])), abs=1e-5
    )
    for strength, spread in zip(blur.strengths, blur.similarities, strict=True):
        blurred = [image.filter(ImageFilter.GaussianBlur(strength)) for image in plain]
        assert spread.mean == pytest.approx(cosines(plain, blurred).mean(), abs=1e-5)
    means = [spread.mean for spread in blur.similarities]
    assert means == sorted(means, reverse=True)
    shifts = [cosines(plain, plain[-s:] + plain[:-s]).mean() for s in range(1, len(plain))]
    assert min(abs(found.baseline.mean - mean) for mean in shifts) < 1e-5
    room = 1 - found.baseline.mean
    assert flip.ignored[0] == pytest.approx((expected.mean() - found.baseline.mean) / room, abs=1e-3)


def test_an_encoder_of_mean_colours_ignores_where_and_minds_colour(source: FolderSource) -> None:
    found = {
        curve.name: curve for curve in measure(MeanColour(), source, {"flip", "grayscale", "hue"}).curves
    }
    assert found["flip"].ignored[0] == pytest.approx(1, abs=1e-5)
    assert found["grayscale"].ignored[0] < 0.95 and min(found["hue"].ignored) < 0.95
    assert not any(curve.is_papers for curve in measure(MeanColour(), source, {"JPEG"}).curves)


def test_a_crop_of_all_is_what_the_network_sees_and_smaller_ones_matter_more(source: FolderSource) -> None:
    (curve,) = measure(Pixels(), source, {"crop"}).curves
    assert curve.strengths[0] == 1 and curve.similarities[0].mean > 0.995
    means = [spread.mean for spread in curve.similarities]
    assert means[0] > means[2] > means[-1]


def test_crops_are_squares_of_their_share_anywhere(source: FolderSource) -> None:
    image = Image.fromarray(np.arange(30 * 30 * 3, dtype=np.uint32).reshape(30, 30, 3).astype(np.uint8))
    corners = set()
    random = np.random.default_rng(0)
    for _ in range(300):
        small = crop(image, 0.25, random)
        assert small.size == (15, 15)
        corners.add(tuple(np.asarray(small)[0, 0]))
    assert len(corners) > 100


def test_the_seed_fixes_the_figures(source: FolderSource) -> None:
    names = {"crop", "noise"}
    assert measure(Pixels(), source, names) == measure(Pixels(), source, names)
    assert measure(Pixels(), source, names, seed=1) != measure(Pixels(), source, names)


def test_every_distortion_of_every_strength_keeps_size_and_mode(source: FolderSource) -> None:
    assert [each.name for each in DISTORTIONS if each.is_papers] == [
        "crop",
        "flip",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "grayscale",
        "blur",
        "solarize",
    ]
    image = crops(source)[0]
    for distortion in DISTORTIONS:
        for strength in distortion.strengths:
            result = distortion.apply(image, strength, np.random.default_rng(0))
            assert result.mode == "RGB"
            assert distortion.needs_original or result.size == image.size
            if distortion.name not in ("crop", "JPEG"):
                assert np.asarray(result).tolist() != np.asarray(image).tolist(), distortion.name


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, write_images: Callable) -> None:
    write_images(tmp_path / "images", ["a", "b"], per_class=12)
    broken = tmp_path / "images" / "b" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(DataError, match=r"b/3\.jpg"):
        measure_invariance(
            Encoder(Pixels(), PLAIN, CONFIG),
            FolderSource(tmp_path / "images"),
            range(24),
            torch.device("cpu"),
            0,
        )
