"""The compiled resize gives PIL's very pixels, for every size and shape."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipelines.resize_numba import crop_and_resize

POISON = 0xAB
GUARD = 64  # bytes on either side of the output


def assert_as_pil(pixels_HW3: np.ndarray, box: tuple[int, int, int, int], size: int) -> None:
    """Fails where a pixel differs from PIL's, or anything beside the output was written."""
    top, left, height, width = box
    crop = Image.fromarray(pixels_HW3).crop((left, top, left + width, top + height))
    expected = np.asarray(crop.resize((size, size), Image.BICUBIC))
    memory = np.full(expected.size + 2 * GUARD, POISON, np.uint8)
    crop_and_resize(pixels_HW3, box, memory[GUARD:-GUARD].reshape(expected.shape))
    where = f"box {box} of {pixels_HW3.shape[:2]} to {size}"
    assert np.array_equal(memory[GUARD:-GUARD].reshape(expected.shape), expected), where
    assert (memory[:GUARD] == POISON).all() and (memory[-GUARD:] == POISON).all(), where


def random_box(
    rng: np.random.Generator, height: int, width: int, h: int, w: int
) -> tuple[int, int, int, int]:
    """Anywhere in the image, as Python integers."""
    return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def extremes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Only 0 and 255: the sums leave the range of 8 bits on both sides."""
    return 255 * rng.integers(0, 2, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("content", [noise, extremes])
def test_small_crops_of_every_shape(content: Callable[[np.random.Generator, int, int], np.ndarray]) -> None:
    """16,000 boxes: shrunk and enlarged, whole images, single pixels, sides that stay as they are."""
    rng = np.random.default_rng(1)
    for _ in range(8000):
        height, width = (int(side) for side in np.exp(rng.uniform(0, 4.5, 2)).astype(int))
        size = int(rng.integers(1, 50))
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        if rng.random() < 0.2:
            h, w = height, width
        if rng.random() < 0.2:
            h = min(size, height)
        if rng.random() < 0.2:
            w = min(size, width)
        assert_as_pil(content(rng, height, width), random_box(rng, height, width, h, w), size)


def test_crops_of_the_sizes_of_photographs() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(150, 900, 2))
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        box = random_box(rng, height, width, h, w)
        assert_as_pil(noise(rng, height, width), box, int(rng.choice([96, 160, 192, 224, 256])))


SIDES = (1, 2, 3, 127, 128, 129, 3000, 20_000)
SHAPES = [
    (height, width, 32) for side in SIDES for height, width in ((1, side), (side, 1), (side, 32), (32, side))
]
SHAPES += [(height, width, 224) for side in SIDES for height, width in ((2, side), (side, 3))]
SHAPES += [(224, 224, 224), (1, 1, 224), (224, 224, 1), (1000, 1, 1), (2100, 1900, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elongated_and_extreme_shapes(shape: tuple[int, int, int]) -> None:
    height, width, size = shape
    rng = np.random.default_rng(height * width)
    assert_as_pil(noise(rng, height, width), (0, 0, height, width), size)
    padded = noise(rng, height + 2, width + 3)  # nothing outside the box counts
    assert_as_pil(padded, (1, 2, height, width), size)


def test_the_order_of_the_passes_is_that_of_pil_on_both_sides_of_its_bound() -> None:
    """Since Pillow 13 the vertical pass comes first where that is less work."""
    rng = np.random.default_rng(3)
    size, orders = 40, set()
    for height in range(size - 4, 3 * size, 9):
        bound = (height + size) // 2
        for width in (1, size - 1, size + 1, bound - 1, bound, bound + 1, bound + 30):
            pixels_HW3 = noise(rng, height, width)
            assert_as_pil(pixels_HW3, (0, 0, height, width), size)
            orders.add(2 * width < height + size)
    assert orders == {False, True}
