"""Promises of `tools.convert.images`: what fits is kept bit by bit, the rest is shrunk well, damage is found.

Shape legend: H, W height and width.
"""

import errno
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.errors import DataError
from tools.convert.images import BadImage, Stored, prepare
from tools.convert.jpeg import read_layout
from tools.convert.manifest import ConvertSettings
from tools.convert.pool import Memory, prepare_entries
from tools.convert.sources import open_image_set


def picture(width: int, height: int, noise: float = 8) -> Image.Image:
    """Smooth colours with some noise in their brightness."""
    rng = np.random.default_rng(21)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth_HW3 = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    noise_HW1 = rng.normal(0, noise, (height, width, 1))
    return Image.fromarray((smooth_HW3 + noise_HW1).clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **{"quality": 92} | options if kind == "JPEG" else options)
    return out.getvalue()


def pixels(stored: Stored) -> np.ndarray:
    if stored.is_raw:
        return np.frombuffer(stored.encoded, np.uint8).reshape(stored.height, stored.width, 3).astype(float)
    with Image.open(io.BytesIO(stored.encoded)) as image:
        assert image.format == "JPEG"
        assert image.size == (stored.width, stored.height)
        return np.asarray(image.convert("RGB"), dtype=float)


def adobe_rgb(image: Image.Image) -> bytes:
    """A JPEG whose components are red, green and blue."""
    return saved(image, keep_rgb=True)


PLAIN = {
    "4:2:0": lambda image: saved(image, subsampling="4:2:0"),
    "4:2:2": lambda image: saved(image, subsampling="4:2:2"),
    "4:4:4": lambda image: saved(image, subsampling="4:4:4"),
    "progressive": lambda image: saved(image, progressive=True),
    "optimised": lambda image: saved(image, optimize=True),
    "restarts": lambda image: saved(image, restart_marker_blocks=3),
    "grayscale": lambda image: saved(image.convert("L")),
    "with orientation": lambda image: saved(image, exif=orientation(6)),
    "with comment": lambda image: saved(image, comment=b"\xff\xd9\xff\xda"),
    "with thumbnail": lambda image: saved(image, icc_profile=saved(image.resize((16, 16)))),
    "flat": lambda image: saved(Image.new("RGB", image.size, (255, 255, 255)), optimize=True),
}


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("check", ["structure", "decode"])
@pytest.mark.parametrize("encode", PLAIN.values(), ids=PLAIN.keys())
def test_jpeg_that_fits_is_copied(encode: Callable[[Image.Image], bytes], check: str) -> None:
    data = encode(picture(331, 517))
    stored = prepare(data, ConvertSettings(max_side=517, check=check))
    assert stored == Stored(data, 517, 331, is_raw=False, was_copied=True)


@pytest.mark.parametrize("encode", PLAIN.values(), ids=PLAIN.keys())
def test_what_is_copied_can_be_decoded_by_every_loader(encode: Callable[[Image.Image], bytes]) -> None:
    threads = torch.get_num_threads()
    from ffcv.libffcv import imdecode
    from nvidia.dali import fn, pipeline_def

    torch.set_num_threads(threads)  # FFCV changes it when it is imported
    data = np.frombuffer(prepare(encode(picture(75, 61)), ConvertSettings()).encoded, np.uint8)
    decoded_HW3 = np.full((61, 75, 3), 0xAB, np.uint8)
    assert imdecode(data, decoded_HW3, 61, 75, 61, 75, 0, 0, 1, 1, False, False) == 0

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode():
        return fn.decoders.image(fn.external_source(lambda: [data], ndim=1), adjust_orientation=False)

    dali_HW3 = np.asarray(decode().run()[0].at(0))
    expected_HW3 = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)
    assert np.abs(decoded_HW3 - expected_HW3).mean() < 3
    assert np.abs(dali_HW3 - expected_HW3).mean() < 1


def test_what_follows_the_end_of_a_jpeg_is_dropped() -> None:
    data = saved(picture(40, 30))
    assert prepare(data + b"\0\0 and more \xff\xd9", ConvertSettings()).encoded == data


REENCODED = {
    "PNG": lambda image: saved(image, "PNG"),
    "WebP": lambda image: saved(image, "WEBP", lossless=True),
    "BMP": lambda image: saved(image, "BMP"),
    "GIF": lambda image: saved(image.quantize(256, dither=Image.Dither.NONE), "GIF"),
    "palette": lambda image: saved(image.quantize(256, dither=Image.Dither.NONE), "PNG"),
    "alpha": lambda image: saved(with_alpha(image), "PNG"),
    "grayscale": lambda image: saved(image.convert("L"), "PNG"),
    "grayscale, alpha": lambda image: saved(with_alpha(image).convert("LA"), "PNG"),
    "16 bit": lambda image: saved(sixteen_bits(image), "PNG"),
    "one bit": lambda image: saved(image.convert("1", dither=Image.Dither.NONE), "PNG"),
    "CMYK TIFF": lambda image: saved(image.convert("CMYK"), "TIFF"),
    "CMYK JPEG": lambda image: saved(image.convert("CMYK"), quality=97),
    "RGB JPEG": adobe_rgb,
}  # fmt: skip


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize("storage", ["jpg", "raw"])
@pytest.mark.parametrize("encode", REENCODED.values(), ids=REENCODED.keys())
def test_other_images_are_decoded_to_rgb(encode: Callable[[Image.Image], bytes], storage: str) -> None:
    data = encode(picture(97, 60))
    stored = prepare(data, ConvertSettings(quality=98, storage=storage))
    assert (stored.width, stored.height, stored.is_raw, stored.was_copied) == (
        97,
        60,
        storage == "raw",
        False,
    )
    expected = Image.open(io.BytesIO(data))
    if expected.mode.startswith("I;16"):
        expected = Image.fromarray((np.asarray(expected) // 257).astype(np.uint8))
    expected = expected.convert("RGB")
    if storage == "jpg":
        expected = Image.open(io.BytesIO(saved(expected, quality=98)))
    assert np.array_equal(pixels(stored), np.asarray(expected, dtype=float))


def test_ycck_jpeg_becomes_rgb() -> None:
    """CMYK as YCbCr and black: Adobe's transform 2, which Pillow reads but does not write."""
    cmyk = picture(64, 48).convert("CMYK")
    data = bytearray(saved(cmyk, quality=97, subsampling="4:4:4"))
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] in (0, 2)
    data[adobe + 11] = 2 - data[adobe + 11]
    assert not read_layout(bytes(data)).is_plain
    stored = prepare(bytes(data), ConvertSettings(storage="raw"))
    expected_HW3 = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)
    assert np.array_equal(pixels(stored), expected_HW3)


SHAPES = [
    (700, 400, 512),
    (513, 20, 512),
    (300, 1601, 256),
    (1025, 1024, 128),
    (90, 89, 33),
    (5000, 90, 512),
]


@pytest.mark.parametrize(("width", "height", "max_side"), SHAPES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_larger_images_are_shrunk_as_pillow_does(width: int, height: int, max_side: int, kind: str) -> None:
    data = saved(picture(width, height, noise=8 if kind == "PNG" else 0), kind)
    stored = prepare(data, ConvertSettings(max_side=max_side, storage="raw"))
    longer = max(width, height)
    size = max(1, width * max_side // longer), max(1, height * max_side // longer)
    assert (stored.width, stored.height) == size
    expected = Image.open(io.BytesIO(data)).resize(size, Image.Resampling.BICUBIC)
    error_HW3 = np.abs(pixels(stored) - np.asarray(expected, dtype=float))
    if kind == "PNG":
        assert error_HW3.max() <= 1
    else:  # decoded at reduced scale
        assert error_HW3.mean() < 2


def test_every_shrunk_size_is_rounded_down() -> None:
    rng = np.random.default_rng(25)
    for _ in range(150):
        width, height, max_side = (int(side) for side in rng.integers((1, 1, 16), (700, 700, 300)))
        stored = prepare(saved(Image.new("L", (width, height))), ConvertSettings(max_side=max_side))
        longer = max(width, height, max_side)
        expected = max(1, width * max_side // longer), max(1, height * max_side // longer)
        assert (stored.width, stored.height) == expected


def test_shrinking_does_not_alias() -> None:
    """A pattern finer than the stored pixels becomes grey, also in a JPEG that is decoded at full size."""
    stripes_HW = np.tile(np.array([0, 255], np.uint8), (300, 150))
    for kind in ("PNG", "JPEG"):
        stored = prepare(
            saved(Image.fromarray(stripes_HW), kind), ConvertSettings(max_side=100, storage="raw")
        )
        assert np.abs(pixels(stored)[5:-5, 5:-5] - 127.5).max() < 8


def test_quality_is_that_of_the_encoder() -> None:
    data = saved(picture(200, 150), "PNG")
    small, medium, large = (
        len(prepare(data, ConvertSettings(quality=quality)).encoded) for quality in (30, 60, 90)
    )
    assert small < 0.8 * medium < 0.64 * large


def test_mixed_storage_keeps_pixels_where_a_jpeg_saves_little() -> None:
    noise = Image.fromarray(np.random.default_rng(23).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    for image, is_raw in ((noise, True), (picture(200, 150).resize((90, 70)), False)):
        for kind in ("PNG", "JPEG"):
            stored = prepare(saved(image, kind), ConvertSettings(storage="mixed", raw_factor=4))
            assert stored.is_raw == is_raw
            assert len(pixels(stored)) == image.height
    stored = prepare(saved(noise), ConvertSettings(storage="mixed", raw_factor=1.0))
    assert not stored.is_raw and stored.was_copied


def test_result_does_not_depend_on_threads() -> None:
    data = [saved(picture(400 + i, 300 - i), "JPEG" if i % 3 else "PNG") for i in range(12)]
    settings = ConvertSettings(max_side=150)
    alone = [prepare(item, settings) for item in data]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda item: prepare(item, settings), data)) == alone


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def overwrite(data: bytes, start: int, block: bytes) -> bytes:
    return data[:start] + block + data[start + len(block) :]


def after(data: bytes, marker: bytes, bytes_later: int, block: bytes) -> bytes:
    """Overwritten so many bytes after a marker."""
    return overwrite(data, data.index(marker) + bytes_later, block)


def frame(data: bytes) -> bytes:
    start = data.index(b"\xff\xc0")
    return data[start : start + 19]


DAMAGES = {
    "empty": (lambda data: b"", "the file is empty"),
    "text": (lambda data: b"this is not an image" * 50, "not an image"),
    "one byte short": (lambda data: data[:-1], "truncated: no end marker"),
    "cut": (cut, "truncated: no end marker"),
    "cut in headers": (lambda data: data[:100], "truncated amid its headers"),
    "start only": (lambda data: data[:2], "truncated"),
    "zeros to the end": (lambda data: cut(data).ljust(len(data), b"\0"), "truncated: no end marker"),
    "lost block": (lambda data: overwrite(data, len(data) // 2, bytes(2048)), "do not decode without errors"),
    "foreign bytes": (lambda data: overwrite(data, len(data) // 2, b"ab \xff\x42 cd"), "marker 42 at byte"),
    "no pixels": (lambda data: data[: data.index(b"\xff\xda")] + b"\xff\xd9", "no pixels before the end"),
    "no height": (lambda data: after(data, b"\xff\xc0", 5, b"\0\0"), "damaged: 331 x 0 pixels"),
    "no frame": (lambda data: data.replace(frame(data), b""), "before the frame header"),
    "two frames": (lambda data: data.replace(frame(data), 2 * frame(data)), "a wrong frame header"),
    "Huffman table": (lambda data: after(data, b"\xff\xc4", 5, b"\xff"), "a wrong Huffman table"),
    "Huffman symbol": (lambda data: after(data, b"\xff\xc4", 21, b"\x77"), "a wrong Huffman table"),
    "quantisation": (lambda data: after(data, b"\xff\xdb", 4, b"\x33"), "a wrong quantisation table"),
    "no table": (lambda data: after(data, b"\xff\xc0", 12, b"\3"), "do not decode without errors"),
    "no Huffman table": (lambda data: after(data, b"\xff\xda", 6, b"\x22"), "do not decode without errors"),
    "no component": (lambda data: after(data, b"\xff\xda", 5, b"\x77"), "do not decode without errors"),
    "scan header": (lambda data: after(data, b"\xff\xda", 4, b"\5"), "do not decode without errors"),
}


@pytest.mark.parametrize("max_side", [1000, 100])
@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_found_without_decoding(
    damage: Callable[[bytes], bytes], words: str, max_side: int
) -> None:
    data = saved(picture(331, 217))
    with pytest.raises(BadImage, match=words) as caught:
        prepare(damage(data), ConvertSettings(max_side=max_side))
    assert "\n" not in str(caught.value)


def test_decoding_finds_what_the_structure_does_not_show() -> None:
    data = saved(picture(331, 217))
    lost = data[: len(data) // 2] + data[len(data) // 2 + 300 :]
    assert prepare(lost, ConvertSettings()).was_copied
    with pytest.raises(BadImage, match="do not decode without errors"):
        prepare(lost, ConvertSettings(check="decode"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_damaged_files_of_other_formats_are_refused(kind: str) -> None:
    data = saved(picture(120, 90), kind)
    with pytest.raises(BadImage, match=r"damaged|not an image"):
        prepare(data[: len(data) // 2], ConvertSettings())


@pytest.mark.parametrize("size", [(1, 1), (1, 65000), (20000, 3)])
def test_odd_sizes_survive(size: tuple[int, int]) -> None:
    for kind in ("PNG", "JPEG"):
        stored = prepare(saved(Image.new("RGB", size, (9, 99, 199)), kind), ConvertSettings())
        assert max(stored.width, stored.height) == min(512, max(size))
        assert min(stored.width, stored.height) == 1
        assert np.abs(pixels(stored) - [9, 99, 199]).max() < 9


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    data = saved(Image.new("1", (20001, 20000)), "PNG")
    with pytest.raises(BadImage, match="exceeds limit"):
        prepare(data, ConvertSettings())


@pytest.mark.parametrize("check", ["structure", "decode"])
def test_a_jpeg_that_claims_too_many_pixels_is_refused_at_once(
    check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("tools.convert.images.decodes_cleanly", fail)
    monkeypatch.setattr("tools.convert.images.decode_rgb", fail)
    data = after(saved(picture(33, 21)), b"\xff\xc0", 5, (60000).to_bytes(2, "big") * 2)
    with pytest.raises(BadImage, match="60000 x 60000 pixels are more than"):
        prepare(data, ConvertSettings(check=check))


@pytest.mark.parametrize("changes", [{"max_side": 100}, {"storage": "raw"}])
def test_the_decode_check_is_for_what_is_copied(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("tools.convert.images.decodes_cleanly", lambda *of: not calls.append(of))
    data = saved(picture(331, 217))
    assert not prepare(data, ConvertSettings(check="decode", **changes)).was_copied
    assert not calls
    assert prepare(data, ConvertSettings(check="decode")).was_copied
    assert calls == [(data, 217, 331)]


def test_32_bit_pixels_are_refused() -> None:
    floats = Image.fromarray(np.random.default_rng(24).normal(size=(9, 7)).astype(np.float32))
    with pytest.raises(BadImage, match="32-bit pixels have no fixed range"):
        prepare(saved(floats, "TIFF"), ConvertSettings())


def test_lack_of_memory_is_not_blamed_on_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("tools.convert.images.decode_rgb", fail)
    with pytest.raises(MemoryError):
        prepare(saved(picture(20, 20), "PNG"), ConvertSettings())


SHORTAGES = {
    "descriptors": OSError(errno.EMFILE, "Too many open files"),
    "descriptors of the machine": OSError(errno.ENFILE, "Too many open files in system"),
    "memory for a file": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "memory": MemoryError(),
    "Pillow's memory": OSError("out of memory when reading image file"),
}


@pytest.mark.parametrize("error", SHORTAGES.values(), ids=SHORTAGES.keys())
@pytest.mark.parametrize("where", ["read", "decode_rgb"])
def test_a_shortage_stops_the_conversion(
    error: Exception, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    (tmp_path / "0.png").write_bytes(saved(picture(20, 20), "PNG"))
    images = open_image_set(tmp_path)
    if where == "read":
        monkeypatch.setattr(images, "read_together", lambda entries, *_: np.zeros(len(entries), bool))
        monkeypatch.setattr(images, "read", fail)
    else:
        monkeypatch.setattr("tools.convert.images.decode_rgb", fail)
    with pytest.raises(DataError, match=r"at 0\.png .*fewer workers or a higher limit .*it goes on"):
        prepare_entries(images, ConvertSettings(), 1 << 23, Memory(), range(1))


def test_lack_of_memory_for_shrinking_stops_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        torch.empty(1 << 58)

    (tmp_path / "0.png").write_bytes(saved(picture(40, 20), "PNG"))
    monkeypatch.setattr("tools.convert.images.interpolate", fail)
    with pytest.raises(DataError, match=r"at 0\.png \(out of memory\)"):
        prepare_entries(open_image_set(tmp_path), ConvertSettings(max_side=16), 1 << 23, Memory(), range(1))


def test_real_photographs_are_whole_and_cut_ones_are_not(shared_data: Path) -> None:
    import tarfile

    archive = shared_data / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip("no sample of ImageNet beside the checkout")
    rng = np.random.default_rng(22)
    copied = 0
    with tarfile.open(archive) as tar:
        for member in (entry for entry in tar if entry.isfile()):
            data = tar.extractfile(member).read()
            stored = prepare(data, ConvertSettings())
            with Image.open(io.BytesIO(data)) as image:
                assert stored.was_copied == (max(image.size) <= 512)
                assert (stored.encoded == data) == stored.was_copied
            copied += stored.was_copied
            with pytest.raises(BadImage, match="truncated"):
                prepare(data[: rng.integers(2, len(data))], ConvertSettings())
    assert copied > 50
