"""Distortions of an image by strength: the paper's own (appendix A) first, then others.

All work in 8 bits with PIL, as the authors' `Transform` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

Apply = Callable[[Image.Image, float, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Distortion:
    """One kind, and the strengths that are tried. `needs_original` where it works on the image before the
    centre crop; all others get the crop that the network sees.
    """

    name: str
    unit: str
    strengths: tuple[float, ...]
    apply: Apply
    is_papers: bool
    needs_original: bool = False


def crop(image: Image.Image, share: float, random: np.random.Generator) -> Image.Image:
    """A square of that share of the area of a square image, anywhere in it."""
    side = max(1, round(image.width * share**0.5))
    left, top = (int(random.integers(0, image.width - side + 1)) for _ in range(2))
    return image.crop((left, top, left + side, top + side))


def _jpeg(image: Image.Image, quality: float, _: np.random.Generator) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, format="jpeg", quality=int(quality))
    return Image.open(buffer).convert("RGB")


def _noise(image: Image.Image, deviation: float, random: np.random.Generator) -> Image.Image:
    pixels_HWC = np.asarray(image) + random.normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray(pixels_HWC.round().clip(0, 255).astype(np.uint8))


FACTORS = (0.2, 0.6, 0.8, 1.2, 1.4, 1.8)

DISTORTIONS = (
    Distortion(
        "crop", "share of the area", (1.0, 0.8, 0.5, 0.3, 0.15, 0.08), crop, True, needs_original=True
    ),
    Distortion("flip", "mirrored", (1.0,), lambda image, *_: ImageOps.mirror(image), True),
    Distortion("brightness", "factor", FACTORS, lambda i, x, _: tv.adjust_brightness(i, x), True),
    Distortion("contrast", "factor", FACTORS, lambda i, x, _: tv.adjust_contrast(i, x), True),
    Distortion("saturation", "factor", (0.0, *FACTORS), lambda i, x, _: tv.adjust_saturation(i, x), True),
    Distortion(
        "hue",
        "turns of the colour circle",
        (-0.5, -0.2, -0.1, -0.05, 0.05, 0.1, 0.2, 0.5),
        lambda i, x, _: tv.adjust_hue(i, x),
        True,
    ),
    Distortion("grayscale", "without colour", (1.0,), lambda i, *_: tv.rgb_to_grayscale(i, 3), True),
    Distortion(
        "blur",
        "sigma in pixels",
        (0.5, 1.0, 2.0, 4.0),
        lambda i, x, _: i.filter(ImageFilter.GaussianBlur(x)),
        True,
    ),
    Distortion(
        "solarize",
        "threshold",
        (224.0, 192.0, 128.0, 64.0),
        lambda i, x, _: ImageOps.solarize(i, int(x)),
        True,
    ),
    Distortion(
        "rotation",
        "degrees, black corners",
        (5.0, 15.0, 45.0, 90.0, 180.0),
        lambda i, x, _: tv.rotate(i, x, InterpolationMode.BILINEAR),
        False,
    ),
    Distortion("JPEG", "quality", (90.0, 70.0, 50.0, 30.0, 10.0), _jpeg, False),
    Distortion("noise", "standard deviation, of 255", (5.0, 10.0, 20.0, 40.0), _noise, False),
)
