"""A .beton file is read as FFCV reads it; one that is damaged is refused, or harms nothing."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from ffcv.reader import Reader
from ffcv.types import HeaderType
from PIL import Image
from torchvision.datasets import ImageFolder

from pipelines.errors import DataError
from pipelines.order import epoch_permutation
from pipelines.source import (
    BETON_ALLOCATION,
    BETON_FIELD,
    BETON_HEADER,
    BETON_IMAGE,
    BETON_VERSION,
    BetonSource,
    open_source,
    read_image,
)

RECORD = np.dtype([("image", BETON_IMAGE), ("label", "<i8")], align=True)


def write_beton(
    path: Path, images_N: np.ndarray, num_bytes_N: np.ndarray, label_N: np.ndarray, data: bytes
) -> Path:
    """A file as FFCV lays it out; `images_N`: BETON_IMAGE, without `data_ptr`, in the order of `data`."""
    header, fields = np.zeros(1, BETON_HEADER), np.zeros(2, BETON_FIELD)
    fields["type_id"], fields["name"] = (2, 1), (b"image", b"label")
    data_start = header.nbytes + fields.nbytes + len(label_N) * RECORD.itemsize
    header[0] = BETON_VERSION, 2, 1 << 21, len(label_N), data_start + len(data)
    metadata, table = np.zeros(len(label_N), RECORD), np.zeros(len(label_N), BETON_ALLOCATION)
    table["sample_id"] = np.arange(len(label_N))
    table["ptr"] = data_start + np.cumsum(num_bytes_N) - num_bytes_N
    table["size"] = num_bytes_N
    metadata["image"], metadata["label"] = images_N, label_N
    metadata["image"]["data_ptr"] = table["ptr"]
    path.write_bytes(
        b"".join([header.tobytes(), fields.tobytes(), metadata.tobytes(), data, table.tobytes()])
    )
    return path


def jpeg(size: tuple[int, int], color: tuple[int, int, int] = (200, 30, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three images of 6 x 5, 7 x 3 and 4 x 4 pixels, the second raw."""
    data = [jpeg((6, 5)), bytes(range(63)), jpeg((4, 4))]
    images_N = np.array([(0, 6, 5, 0), (1, 7, 3, 0), (0, 4, 4, 0)], BETON_IMAGE)
    lengths_N = np.array([len(image) for image in data])
    return write_beton(tmp_path / "small.beton", images_N, lengths_N, np.array([0, 2, 1]), b"".join(data))


def test_extents_are_where_the_images_lie(small: Path) -> None:
    source, whole = open_source(small), small.read_bytes()
    (file, start, length), (_, raw_start, raw_length) = source.extents(np.array([2, 1]))
    assert file == small and whole[start : start + length] == source.encoded(2).tobytes()
    assert whole[raw_start : raw_start + raw_length] == source.pixels(1).tobytes()


def patched(beton: Path, target: Path, offset: int, data: bytes) -> Path:
    """A copy of `beton` with other bytes at `offset`."""
    shutil.copy(beton, target)
    with target.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return target


def test_beton_is_read_as_ffcv_reads_it(beton, image_folder):
    source, reader = open_source(beton), Reader(str(beton))
    assert isinstance(source, BetonSource)
    everything = np.arange(len(source))
    heights, widths = source.sizes(everything)
    assert len(source) == reader.num_samples == 24
    np.testing.assert_array_equal(heights, reader.metadata["f0"]["height"])
    np.testing.assert_array_equal(widths, reader.metadata["f0"]["width"])
    np.testing.assert_array_equal(source.labels_N, ImageFolder(image_folder).targets)
    sizes = dict(zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True))
    assert [len(source.encoded(i)) for i in everything] == [
        sizes[p] for p in reader.metadata["f0"]["data_ptr"]
    ]
    assert [read_image(source, i).size for i in everything] == list(zip(widths, heights, strict=True))


def test_class_names_come_from_the_manifest(beton, tmp_path):
    copy = Path(shutil.copy(beton, tmp_path / "x.beton"))
    assert open_source(copy).classes == ["0", "1", "2"]
    manifest = tmp_path / "x.manifest.json"
    manifest.write_text(json.dumps({"classes": ["ant", "bee", "cat"]}))
    assert open_source(copy).classes == ["ant", "bee", "cat"]
    manifest.write_text(json.dumps({"classes": ["ant", "bee", "cat"], "images": 24}))
    assert open_source(copy).classes == ["ant", "bee", "cat"]
    manifest.write_text(json.dumps({"classes": ["ant", "bee", "cat"], "images": 25}))
    with pytest.raises(DataError, match=r"belongs to another dataset .*25 images, not 24.*convert"):
        open_source(copy)
    for wrong in ('{"classes": ["ant", "bee"]}', '{"classes": 3}', '{"labels": []}', "[]", "{", ""):
        manifest.write_text(wrong)
        with pytest.raises(DataError, match=r"x\.manifest\.json"):
            open_source(copy)


def test_beton_that_is_cut_short_is_refused(beton, tmp_path):
    whole = beton.read_bytes()
    header = np.frombuffer(whole, HeaderType, 1)[0]
    table = int(header["alloc_table_ptr"])
    cut = tmp_path / "cut.beton"
    lengths = [
        0,
        1,
        HeaderType.itemsize,
        1500,
        2150,
        table // 2,
        table,
        table + 24,
        len(whole) - 24,
        len(whole) - 1,
    ]
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.beton is cut short or damaged"):
            open_source(cut)


def test_damaged_beton_is_refused(beton, tmp_path):
    target = tmp_path / "x.beton"
    field = HeaderType.fields
    rng = np.random.default_rng(3)
    with pytest.raises(DataError, match=r"not a \.beton file of version 2"):
        open_source(patched(beton, target, field["version"][1], b"\1\0"))
    with pytest.raises(DataError, match=r"not a \.beton file of version 2"):
        open_source(patched(beton, target, field["page_size"][1], b"\3"))
    with pytest.raises(DataError, match=r"cut short or damaged"):  # a conversion that was killed
        open_source(patched(beton, target, field["alloc_table_ptr"][1], bytes(8)))
    with pytest.raises(DataError, match=r"holds no samples"):
        open_source(patched(beton, target, field["num_samples"][1], bytes(8)))
    for name in ("num_fields", "num_samples", "alloc_table_ptr"):
        dtype, offset = field[name][:2]
        with pytest.raises(DataError, match=r"cut short or damaged|no field"):
            open_source(patched(beton, target, offset, b"\xff" * dtype.itemsize))
    for _ in range(20):
        target.write_bytes(rng.bytes(int(rng.integers(1, 5000))))
        with pytest.raises(DataError, match=r"x\.beton"):
            open_source(target)


def test_beton_whose_images_lie_outside_the_file_is_refused(beton, tmp_path):
    reader = Reader(str(beton))
    table, row = int(reader.header["alloc_table_ptr"]), reader.alloc_table.dtype
    size_of_row_3 = table + 3 * row.itemsize + row.fields["size"][1]
    ptr_of_row_3 = table + 3 * row.itemsize + row.fields["ptr"][1]
    for offset in (size_of_row_3, ptr_of_row_3):
        with pytest.raises(DataError, match=r"cut short or damaged"):
            open_source(patched(beton, tmp_path / "x.beton", offset, b"\xff\xff\xff\xff"))
    for offset in (size_of_row_3, ptr_of_row_3):  # numbers that are negative as int64
        with pytest.raises(DataError, match=r"cut short or damaged"):
            open_source(patched(beton, tmp_path / "x.beton", offset + 7, b"\x80"))


def test_beton_without_the_needed_fields_is_refused(tmp_path):
    from ffcv.fields import FloatField, IntField
    from ffcv.writer import DatasetWriter

    path = tmp_path / "x.beton"
    fields = {"covariate": FloatField(), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset([(0.5, 1), (1.5, 2)])
    with pytest.raises(DataError, match=r"no field 'image' of type RGBImageField .*covariate, label"):
        open_source(path)


def test_raw_pixels_are_not_taken_for_a_jpeg(tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path / "x.beton"
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset([(np.zeros((9, 8, 3), np.uint8), 1)])
    with pytest.raises(DataError, match=r"sample 0 of .* stored as raw pixels"):
        open_source(path).encoded(0)


def test_a_file_cut_short_anywhere_is_refused(small, tmp_path):
    cut = Path(shutil.copy(small, tmp_path / "cut.beton"))
    assert len(open_source(cut)) == 3
    for length in reversed(range(small.stat().st_size)):
        os.truncate(cut, length)
        with pytest.raises(DataError, match=r"cut\.beton is cut short or damaged"):
            open_source(cut)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_one_wrong_byte_never_leads_out_of_the_file(flip, small):
    """In header, descriptors, metadata and allocation table: refused, or every access stays inside."""
    whole = small.read_bytes()
    image_bytes = sum(len(image) for image in (jpeg((6, 5)), bytes(63), jpeg((4, 4))))
    table = len(whole) - 3 * BETON_ALLOCATION.itemsize
    places = [*range(table - image_bytes), *range(table, len(whole))]
    assert len(places) == 24 + 2 * 1041 + 3 * 24 + 3 * 24
    num_opened = 0
    for before, place in zip([0, *places], places, strict=False):
        with small.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), whole[before : before + 1], before)
            os.pwrite(file.fileno(), bytes([whole[place] ^ flip]), place)
        try:
            source = open_source(small)
        except DataError:
            continue
        num_opened += 1
        heights, widths = source.sizes(np.arange(len(source)))
        start_N, num_bytes_N, *_ = source.stored(np.arange(len(source)))
        assert len(source) == 3 and start_N.min() > 0 and (start_N + num_bytes_N).max() <= len(whole)
        assert min(heights.min(), widths.min()) >= 1 and max(heights.max(), widths.max()) < 2**16
        for index in range(3):
            pixels = source.pixels(index)
            stored = source.encoded(index) if pixels is None else pixels.ravel()
            assert bytes(stored) == bytes(source.file[start_N[index] :][: num_bytes_N[index]])
            try:
                assert read_image(source, index).size == (widths[index], heights[index])
            except DataError as error:
                assert f"sample {index} of" in str(error)
    assert 2000 < num_opened < len(places)  # most bytes of a descriptor say nothing


def test_an_image_that_is_not_of_the_stated_size_is_refused(tmp_path):
    """Its crop boxes would be those of another image, and reach beyond it without an error."""
    data = jpeg((6, 5))
    images_N = np.array([(0, 7, 5, 0)], BETON_IMAGE)
    path = write_beton(tmp_path / "x.beton", images_N, np.array([len(data)]), np.array([0]), data)
    with pytest.raises(DataError, match=r"sample 0 of .* is of 6 x 5 pixels, not 7 x 5 as stated"):
        read_image(open_source(path), 0)


def test_a_file_that_becomes_shorter_while_it_is_open_is_refused(small):
    """Touching the missing bytes would end the process."""
    source = open_source(small)
    with small.open("r+b") as file:
        file.truncate(1)
    for read in (lambda: source.encoded(0), lambda: source.pixels(1), lambda: source.stored(np.array([2]))):
        with pytest.raises(DataError, match=r"small\.beton is cut short or damaged"):
            read()


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_is_removed_or_replaced_while_it_is_open_stays_readable(replace, small, tmp_path):
    source, data = open_source(small), open_source(small).encoded(2).tobytes()
    if replace:
        (tmp_path / "other").write_bytes(b"?")
        (tmp_path / "other").rename(small)
    else:
        small.unlink()
    assert source.encoded(2).tobytes() == data
    assert source.pixels(1).ravel().tolist() == list(range(63))


@pytest.mark.parametrize("size", [(1, 1), (20_000, 9_500)])
def test_smallest_and_largest_images_load(size, tmp_path):
    """20,000 x 9,500 pixels are more than Pillow takes by itself."""
    data = jpeg(size)
    images_N = np.array([(0, *size, 0)], BETON_IMAGE)
    path = write_beton(tmp_path / "x.beton", images_N, np.array([len(data)]), np.array([0]), data)
    image = read_image(open_source(path), 0)
    assert image.size == size
    assert np.abs(np.array(image.getpixel((0, 0))) - (200, 30, 40)).max() <= 3


@pytest.mark.parametrize("label", [-1, 2**20 + 1, 2**62])
def test_labels_out_of_range_are_refused(label, small, tmp_path):
    offset = BETON_HEADER.itemsize + 2 * BETON_FIELD.itemsize + RECORD.itemsize + RECORD.fields["label"][1]
    damaged = patched(small, tmp_path / "x.beton", offset, np.int64(label).tobytes())
    with pytest.raises(DataError, match=r"x\.beton has labels outside 0 to 1048576"):
        open_source(damaged)


@pytest.mark.timeout(60)
def test_a_million_samples_open_and_shuffle(tmp_path):
    rng, count = np.random.default_rng(4), 1_000_000
    images_N = np.zeros(count, BETON_IMAGE)
    images_N["mode"], images_N["height"], images_N["width"] = 1, 1, rng.integers(1, 3, count)
    num_bytes_N = 3 * images_N["width"].astype(np.int64)
    label_N, data = rng.integers(0, 1000, count), rng.bytes(int(num_bytes_N.sum()))
    source = open_source(write_beton(tmp_path / "x.beton", images_N, num_bytes_N, label_N, data))
    assert len(source) == count and len(source.classes) == 1000
    np.testing.assert_array_equal(source.labels_N, label_N)
    heights, widths = source.sizes(np.arange(count))
    assert (heights == 1).all()
    np.testing.assert_array_equal(widths, images_N["width"])
    permutation = epoch_permutation(count, seed=1, epoch=2, group_sizes_G=source.group_sizes_G)
    assert (np.bincount(permutation) == 1).all()
    ends_N = np.cumsum(num_bytes_N)
    for index in permutation[:100]:
        assert source.pixels(index).tobytes() == data[ends_N[index] - num_bytes_N[index] : ends_N[index]]
