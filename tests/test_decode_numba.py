"""Compiled code decodes JPEGs to PIL's very pixels, and no bytes make it crash or write elsewhere."""

import ctypes
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipelines import decode_numba
from pipelines.decode_numba import OTHER_SIZE, UNREADABLE, decode, image_size
from pipelines.errors import DataError

POISON = 0xAB
GUARD = 64  # bytes on either side of the memory to decode into


@pytest.fixture(autouse=True)
def room_for_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL does not expect progressive files to be larger than their pixels."""
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 2**20)


def jpeg_of(image: Image.Image, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def picture(rng: np.random.Generator, height: int, width: int, smooth: bool) -> Image.Image:
    if smooth:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        return coarse.resize((width, height), Image.BICUBIC)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def decode_guarded(jpeg: bytes, height: int, width: int) -> tuple[int, np.ndarray]:
    """Status and pixels; fails where anything beside the pixels was written."""
    size = 3 * height * width
    memory = np.full(size + 2 * GUARD, POISON, np.uint8)
    status = decode(np.frombuffer(jpeg, np.uint8), memory[GUARD : GUARD + size].reshape(height, width, 3))
    assert (memory[:GUARD] == POISON).all() and (memory[GUARD + size :] == POISON).all()
    return status, memory[GUARD : GUARD + size].reshape(height, width, 3)


def assert_as_pil(jpeg: bytes) -> None:
    expected = np.asarray(Image.open(BytesIO(jpeg)).convert("RGB"))
    assert image_size(np.frombuffer(jpeg, np.uint8)) == expected.shape[:2]
    status, pixels_HW3 = decode_guarded(jpeg, *expected.shape[:2])
    assert status == 0
    np.testing.assert_array_equal(pixels_HW3, expected)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_the_pixels_are_those_of_pil(subsampling: str, options: dict) -> None:
    rng = np.random.default_rng(1)
    for height, width in ((1, 1), (7, 13), (3, 500), (500, 3), (16, 16), (123, 77), (200, 301)):
        for smooth in (False, True):
            for quality in (20, 75, 96):
                image = picture(rng, height, width, smooth)
                assert_as_pil(jpeg_of(image, subsampling=subsampling, quality=quality, **options))
                assert_as_pil(jpeg_of(image.convert("L"), quality=quality, **options))


@pytest.mark.parametrize(
    ("written", "factors", "name"), [("4:2:2", 0x12, "4:4:0"), ("4:2:0", 0x41, "4:1:1")], ids=str
)
def test_subsamplings_that_pil_does_not_write(written: str, factors: int, name: str) -> None:
    """The same blocks in another arrangement, which is valid where both have the same number of units."""
    rng = np.random.default_rng(2)
    for smooth in (False, True):
        jpeg = bytearray(jpeg_of(picture(rng, 96, 160, smooth), subsampling=written))
        frame = jpeg.index(b"\xff\xc0")
        assert jpeg[frame + 11] == {"4:2:2": 0x21, "4:2:0": 0x22}[written]  # of the first channel
        jpeg[frame + 11] = factors
        assert_as_pil(bytes(jpeg))


def test_real_photographs(shared_data: Path) -> None:
    tested = 0
    with tarfile.open(shared_data / "imagenet-sample.tar") as archive:
        for member in archive:
            if member.name.lower().endswith((".jpg", ".jpeg")):
                assert_as_pil(archive.extractfile(member).read())
                tested += 1
    assert tested


def test_memory_of_another_size_is_left_alone() -> None:
    jpeg = jpeg_of(picture(np.random.default_rng(3), 20, 30, False))
    for height, width in ((30, 20), (20, 29), (21, 30), (19, 30), (40, 60), (10, 15), (1, 1), (0, 0)):
        status, pixels_HW3 = decode_guarded(jpeg, height, width)
        assert status == OTHER_SIZE and (pixels_HW3 == POISON).all()


def test_what_libturbojpeg_refuses_is_reported() -> None:
    rng = np.random.default_rng(4)
    good = jpeg_of(picture(rng, 40, 50, False))
    cmyk = jpeg_of(picture(rng, 40, 50, False).convert("CMYK"))
    garbage = rng.integers(0, 256, 1000, dtype=np.uint8).tobytes()
    png = BytesIO()
    picture(rng, 40, 50, False).save(png, "PNG")
    for data in (
        cmyk,
        garbage,
        png.getvalue(),
        b"",
        good[:1],
        good[:100],
        good[: len(good) // 2],
        good[:-40],
    ):
        assert decode_guarded(data, 40, 50)[0] == UNREADABLE
    assert image_size(np.frombuffer(garbage, np.uint8)) == (0, 0)


def test_flipped_bytes_never_crash_nor_pass_as_another_picture() -> None:
    """What is called good is what PIL sees, too."""
    rng = np.random.default_rng(5)
    good = refused = 0
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        jpeg = jpeg_of(picture(rng, 37, 53, True), **options)
        for _ in range(300):
            damaged = bytearray(jpeg)
            for _ in range(rng.integers(1, 4)):
                damaged[rng.integers(len(jpeg))] = rng.integers(256)
            status, pixels_HW3 = decode_guarded(bytes(damaged), 37, 53)
            if status != 0:
                refused += 1
                continue
            try:
                expected = np.asarray(Image.open(BytesIO(damaged)).convert("RGB"))
            except (OSError, SyntaxError, ValueError):
                continue  # PIL reads more of the headers
            good += 1
            np.testing.assert_array_equal(pixels_HW3, expected)
    assert good > 100 and refused > 100


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DataError, match="libturbojpeg0"):
        decode_numba._bind("tjDestroy", decode_numba._int, decode_numba._pointer)
