"""A small image dataset, drawn instead of downloaded: what an image shows is decided by its pattern alone.

Each class is one pattern. Everything else is drawn independently of the class: colours, scale, direction,
warp, the region that the pattern covers, the background, clutter, light and noise. Pixels or colour averages
thus say little about the class, while every larger crop of an image still shows its pattern.
"""

import io
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.errors import DataError
from tools.processes import run_processes

SIDES = (72, 128)  # range of an image's width and height, in pixels
SUPERSAMPLE = 2
PERIODS = (12.0, 20.0)  # range of the pattern's period, in pixels

Field = np.ndarray  # float32, one value per drawn pixel
Pattern = Callable[[Field, Field, np.random.Generator], Field]  # positive inside; u, v in periods


def make_demo_images(
    out: Path, *, seed: int = 0, per_class_train: int = 250, per_class_val: int = 50, workers: int = 2
) -> None:
    """Draw `out/train/<class>/0000.jpg` and `out/val/...`: 12 classes of RGB JPEGs, 72 to 128 pixels a side.

    The same seed gives the same bytes with the same versions of NumPy and Pillow, whatever `workers`.
    `out` appears only when all images are there. Raises `DataError` where it exists or cannot be written.
    """
    if out.exists():
        raise DataError(
            f"The folder for the demo images, {out}, already exists; remove it or choose another."
        )
    counts = {"train": per_class_train, "val": per_class_val}
    names = [
        (split, label, index)
        for split, count in counts.items()
        for label in range(len(PATTERNS))
        for index in range(count)
    ]
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        for split in counts:
            for name in PATTERNS:
                (part / split / name).mkdir(parents=True)
        jobs = [partial(_draw_share, part, seed, names[worker::workers]) for worker in range(workers)]
        run_processes(jobs, lambda: None)
        part.rename(out)
    except OSError as error:
        raise DataError(
            f"The demo images cannot be written to {out}: {error.strerror}; choose another folder."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _draw_share(folder: Path, seed: int, names: list[tuple[str, int, int]]) -> None:
    for split, label, index in names:
        pattern = list(PATTERNS)[label]
        jpeg = draw_jpeg(pattern, np.random.default_rng([seed, split == "val", label, index]))
        (folder / split / pattern / f"{index:04}.jpg").write_bytes(jpeg)


def draw_jpeg(pattern: str, rng: np.random.Generator) -> bytes:
    """One image of the class `pattern` as JPEG bytes.

    1. Pattern: a warped, turned and scaled field, cut to a blob.
    2. Colours: two palettes that drift over the image, far enough apart in lightness to be seen.
    3. Clutter: bars and discs, over the pattern.
    4. Light and noise.
    """
    width, height = (int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, 2))
    # 1.
    fine = (height * SUPERSAMPLE, width * SUPERSAMPLE)
    y, x = np.mgrid[: fine[0], : fine[1]].astype(np.float32) / SUPERSAMPLE
    period, angle = (
        math.exp(rng.uniform(math.log(PERIODS[0]), math.log(PERIODS[1]))),
        rng.uniform(-0.4, 0.4),
    )
    cos, sin = math.cos(angle) / period, math.sin(angle) / period
    warped_x, warped_y = x + 3 * _smooth_field(rng, fine, 3), y + 3 * _smooth_field(rng, fine, 3)
    u = cos * warped_x + sin * warped_y + rng.uniform(0, 1)
    v = (cos * warped_y - sin * warped_x) * rng.uniform(0.9, 1.1) + rng.uniform(0, 1)
    centre_x, centre_y = rng.uniform(0.35, 0.65) * width, rng.uniform(0.35, 0.65) * height
    radius = np.hypot((x - centre_x) / width, (y - centre_y) / height) + 0.08 * _smooth_field(rng, fine, 4)
    inside = (PATTERNS[pattern](u, v, rng) > 0) & (radius < rng.uniform(0.42, 0.62))
    cover_HW1 = inside.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE).mean(axis=(1, 3), dtype=np.float32)[
        ..., None
    ]
    # 2.
    size = (height, width)
    middle, gap = rng.uniform(0.4, 0.6), rng.uniform(0.35, 0.6) * (-1) ** int(rng.integers(2))
    ground_HWC, figure_HWC = _colours(rng, size, middle - gap / 2), _colours(rng, size, middle + gap / 2)
    image_HWC = ground_HWC + cover_HW1 * (figure_HWC - ground_HWC)
    # 3.
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(rng.integers(0, 3)):
        from_x, from_y, turn = x - rng.uniform(0, width), y - rng.uniform(0, height), rng.uniform(0, math.pi)
        along = math.cos(turn) * from_x + math.sin(turn) * from_y
        across = math.cos(turn) * from_y - math.sin(turn) * from_x
        image_HWC[np.hypot(along / rng.uniform(5, 30), across / rng.uniform(2, 7)) < 1] = rng.uniform(
            0.1, 0.9, 3
        )
    # 4.
    image_HWC *= 1 + 0.25 * _smooth_field(rng, size, 2)[..., None]
    image_HWC += rng.uniform(0.01, 0.03) * rng.standard_normal(image_HWC.shape, dtype=np.float32)
    buffer = io.BytesIO()
    Image.fromarray((image_HWC.clip(0, 1) * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _smooth_field(rng: np.random.Generator, size: tuple[int, int], knots: int) -> Field:
    """A random field (height, width) between about -1 and 1 that changes over 1 / `knots` of the image."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (knots, knots)).astype(np.float32))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))


def _colours(rng: np.random.Generator, size: tuple[int, int], lightness: float) -> np.ndarray:
    """Float32 RGB (height, width, 3) of a mean lightness, with drifting hue and a fine texture."""
    tint_HWC = np.stack([rng.normal(0, 0.06) + 0.06 * _smooth_field(rng, size, 3) for _ in range(3)], axis=-1)
    tint_HWC -= tint_HWC.mean(axis=-1, keepdims=True)
    grain = _smooth_field(rng, size, int(rng.integers(6, 24)))
    return lightness + tint_HWC + 0.1 * grain[..., None]


def _cells(u: Field, v: Field, rng: np.random.Generator) -> tuple[Field, Field]:
    """Coordinates -1 to 1 inside the cells of a lattice whose rows are shifted."""
    row = np.floor(v)
    shifted = u + rng.uniform(0, 1) * row
    return 2 * (shifted % 1) - 1, 2 * (v % 1) - 1


def _triangle_wave(v: Field) -> Field:
    return 2 * np.abs(2 * (v % 1) - 1) - 1


def _stripes(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return np.sin(2 * math.pi * u) - rng.uniform(-0.4, 0.4)


def _waves(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return np.sin(2 * math.pi * (u + rng.uniform(0.25, 0.4) * np.sin(2 * math.pi * v * 0.8))) - rng.uniform(
        -0.3, 0.3
    )


def _zigzag(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return np.sin(2 * math.pi * (u + rng.uniform(0.35, 0.5) * _triangle_wave(v * 0.8))) - rng.uniform(
        -0.3, 0.3
    )


def _checker(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return np.sin(math.pi * u * 1.2) * np.sin(math.pi * v * 1.2)


def _grid(u: Field, v: Field, rng: np.random.Generator) -> Field:
    a, b = 2 * (u % 1) - 1, 2 * (v % 1) - 1
    return np.maximum(np.abs(a), np.abs(b)) - rng.uniform(0.6, 0.75)


def _bricks(u: Field, v: Field, rng: np.random.Generator) -> Field:
    v = v * 1.6
    a, b = 2 * ((u * 0.9 + 0.5 * np.floor(v)) % 1) - 1, 2 * (v % 1) - 1
    return np.minimum(0.85 - np.abs(a), rng.uniform(0.65, 0.75) - np.abs(b))


def _dots(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return rng.uniform(0.5, 0.75) - np.hypot(*_cells(u, v, rng))


def _rings(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return rng.uniform(0.18, 0.26) - np.abs(np.hypot(*_cells(u, v, rng)) - 0.62)


def _crosses(u: Field, v: Field, rng: np.random.Generator) -> Field:
    a, b = np.abs(_cells(u, v, rng))
    return np.minimum(rng.uniform(0.2, 0.28) - np.minimum(a, b), 0.8 - np.maximum(a, b))


def _triangles(u: Field, v: Field, rng: np.random.Generator) -> Field:
    a, b = _cells(u, v, rng)
    return np.minimum(b + 0.65, rng.uniform(0.65, 0.8) - b - 1.7 * np.abs(a))


def _stars(u: Field, v: Field, rng: np.random.Generator) -> Field:
    a, b = _cells(u, v, rng)
    return 0.55 + 0.3 * np.cos(5 * np.arctan2(b, a)) - np.hypot(a, b)


def _eyes(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Concentric rings in large cells."""
    return np.cos(2 * math.pi * rng.uniform(1.4, 1.7) * np.hypot(*_cells(u * 0.6, v * 0.6, rng)))


PATTERNS: dict[str, Pattern] = {
    "bricks": _bricks,
    "checker": _checker,
    "crosses": _crosses,
    "dots": _dots,
    "eyes": _eyes,
    "grid": _grid,
    "rings": _rings,
    "stars": _stars,
    "stripes": _stripes,
    "triangles": _triangles,
    "waves": _waves,
    "zigzag": _zigzag,
}
