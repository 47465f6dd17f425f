"""Sources give the samples that the formats' own libraries give, and say what is wrong with a dataset."""

import errno
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ffcv.reader import Reader
from ffcv.types import HeaderType
from torchvision.datasets import ImageFolder

from pipelines.errors import DataError
from pipelines.source import BetonSource, FolderSource, open_source, read_image


def patched(beton: Path, target: Path, offset: int, data: bytes) -> Path:
    """A copy of `beton` with other bytes at `offset`."""
    shutil.copy(beton, target)
    with target.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return target


def test_folder_has_the_samples_of_image_folder_in_its_order(image_folder):
    ours, theirs = open_source(image_folder), ImageFolder(image_folder)
    assert isinstance(ours, FolderSource)
    assert ours.classes == theirs.classes
    assert ours.labels_N.tolist() == theirs.targets
    assert ours.labels_N.dtype == np.int64
    assert [ours.name(i) for i in range(len(ours))] == [path for path, _ in theirs.samples]
    assert ours.encoded(4).tobytes() == Path(theirs.samples[4][0]).read_bytes()
    heights, widths = ours.sizes(np.array([5, 0, 5]))
    assert [(w, h) for h, w in zip(heights, widths, strict=True)] == [theirs[i][0].size for i in (5, 0, 5)]


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


def test_paths_without_a_dataset_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"There is no dataset at .*nowhere"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is empty"):
        open_source(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"?")
    with pytest.raises(DataError, match=r"no class sub-folders"):
        open_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no images"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"a\.jpg is neither a folder nor a \.beton file"):
        open_source(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        open_source(tmp_path / ("x" * 300))


def test_folder_without_permission_is_explained(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # the superuser may read everything
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        open_source(tmp_path)


def test_image_that_cannot_be_read_is_named(tmp_path, image_folder):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.jpg").write_bytes(b"no image")
    whole = open_source(image_folder).encoded(0).tobytes()
    (tmp_path / "c" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    source = open_source(tmp_path)
    with pytest.raises(DataError, match=r"c/0\.jpg cannot be read \(no known image format\)"):
        read_image(source, 0)
    with pytest.raises(DataError, match=r"c/0\.jpg cannot be read"):
        source.sizes(np.array([0]))
    with pytest.raises(DataError, match=r"c/1\.jpg cannot be read .*truncated"):
        read_image(source, 1)
    (tmp_path / "c" / "1.jpg").unlink()
    for read in (source.encoded, partial(read_image, source)):
        with pytest.raises(
            DataError, match=r"^The image .*c/1\.jpg cannot be read \(No such file or directory\)"
        ):
            read(1)


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
