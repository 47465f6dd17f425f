"""Shards are read as they were written, at any place; those that are damaged are refused by name."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import DataError
from pipelines.order import WINDOW, epoch_permutation
from pipelines.source import FolderSource, ShardSource, open_source, read_image
from tools.convert.convert import convert


@pytest.fixture(scope="module")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "x"
    convert(image_folder, path, shards=4, workers=1)
    return path


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "x"))


def write_shard(path: Path, images: list[bytes]) -> Path:
    """One shard without labels."""
    path.mkdir()
    tar, lines = io.BytesIO(), [f"v1.2 {len(images)}"]
    for number, image in enumerate(images):
        tar.write(bytes(512))
        lines.append(f"jpg {tar.tell()} {len(image)} {number}.jpg")
        tar.write(image + bytes(-len(image) % 512))
    files = {"shard-000000.tar": tar.getvalue() + bytes(1024), "shard-000000.idx": "\n".join(lines).encode()}
    for name, data in files.items():
        (path / name).write_bytes(data)
    listed = [{"file": name, "bytes": len(data)} for name, data in files.items()]
    (path / "manifest.json").write_text(json.dumps({"classes": [], "images": len(images), "files": listed}))
    return path


def jpeg(size: tuple[int, int], **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(file, "JPEG", **options)
    return file.getvalue()


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_shards_hold_the_samples_of_the_folder_in_its_order(shards: Path, image_folder: Path) -> None:
    ours, theirs = open_source(shards), FolderSource(image_folder)
    assert isinstance(ours, ShardSource) and len(list(shards.glob("*.tar"))) == 4
    assert (len(ours), ours.classes) == (len(theirs), theirs.classes)
    mixed = np.random.default_rng(2).permutation(len(theirs))
    np.testing.assert_array_equal(ours.labels(mixed), theirs.labels_N[mixed])
    np.testing.assert_array_equal(ours.labels_N, theirs.labels_N)
    assert ours.labels_N.dtype == np.int64
    for got, wanted in zip(ours.sizes(mixed), theirs.sizes(mixed), strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == np.int32
    for index in mixed:
        assert ours.pixels(index) is None
        # Grayscale files are kept as they are, too.
        assert ours.encoded(index).tobytes() == theirs.encoded(index).tobytes()
        assert read_image(ours, index).size == read_image(theirs, index).size


def test_extents_are_where_the_images_lie(shards: Path, image_folder: Path) -> None:
    for source in (open_source(shards), open_source(image_folder)):
        indices = np.array([17, 0, 23])
        for index, (file, start, length) in zip(indices, source.extents(indices), strict=True):
            assert file.read_bytes()[start : start + length] == source.encoded(index).tobytes()


def test_shards_without_labels_have_no_classes(image_folder: Path, tmp_path: Path) -> None:
    convert(image_folder, tmp_path / "x", shards=2, unlabelled=True, workers=1)
    source = open_source(tmp_path / "x")
    assert source.classes == []
    assert source.labels_N.tolist() == [0] * 24
    assert read_image(source, 23).mode == "RGB"


def test_sizes_are_those_that_pillow_finds(tmp_path: Path) -> None:
    """Also behind comments longer than what is read at first, in other formats, of progressive files."""
    images = [
        jpeg((31, 17)),
        jpeg((1, 1), progressive=True),
        jpeg((20_000, 3), comment=b"\xff\xc0" * 3000),
        jpeg((5, 8), icc_profile=bytes(70_000)),
        jpeg((6, 4))[:2] + b"\xff" + jpeg((6, 4))[2:],  # a marker may be filled up
    ]
    png = io.BytesIO()
    Image.new("L", (9, 2)).save(png, "PNG")
    source = open_source(write_shard(tmp_path / "x", [*images, png.getvalue()]))
    heights, widths = source.sizes(np.arange(6))
    expected = [(17, 31), (1, 1), (3, 20_000), (8, 5), (4, 6), (2, 9)]
    assert list(zip(heights.tolist(), widths.tolist(), strict=True)) == expected
    for index, (height, width) in enumerate(expected):
        assert read_image(source, index).size == (width, height)


@pytest.mark.parametrize("data", [b"?", b"\xff\xd8", b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\0", b"GIF89a"])
def test_images_of_a_few_bytes_are_named(data: bytes, tmp_path: Path) -> None:
    source = open_source(write_shard(tmp_path / "x", [jpeg((2, 2)), data]))
    for read in (lambda: read_image(source, 1), lambda: source.sizes(np.array([0, 1]))):
        with pytest.raises(DataError, match=r"^The image sample 1 of .*000\.tar cannot be read \(.+\)"):
            read()


def test_every_damaged_header_is_found_or_harmless(tmp_path: Path) -> None:
    whole, rng = bytearray(jpeg((31, 17))), np.random.default_rng(8)
    start = bytes(whole).index(b"\xff\xda")
    images = []
    for place in range(start):
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        images.append(bytes(damaged))
    source, refused = open_source(write_shard(tmp_path / "x", images)), 0
    for index in range(len(images)):
        try:
            image = read_image(source, index)
            assert [side[0] for side in source.sizes(np.array([index]))] == [image.height, image.width]
        except DataError as error:
            refused += 1
            assert f"sample {index} of" in str(error)
    assert 10 < refused < len(images)


def test_missing_and_short_files_are_refused(copied: Path) -> None:
    tar, index = copied / "shard-000002.tar", copied / "shard-000001.idx"
    for file in (tar, index):
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(DataError, match=rf"The file .*{file.name} is missing; copy the shards again"):
            open_source(copied)
        for length in (0, 1, len(data) - 1):
            file.write_bytes(data[:length])
            with pytest.raises(DataError, match=rf"{file.name} has {length} bytes, not {len(data)}; copy"):
                open_source(copied)
        file.write_bytes(data)
    assert len(open_source(copied)) == 24


def test_an_index_that_does_not_match_is_refused(copied: Path) -> None:
    """Of the same length, so that only its content tells."""
    index = copied / "shard-000001.idx"
    text = index.read_text()
    words = text.split()
    first, second = text.splitlines()[1:3]
    wrong = [
        text.replace("v1.2", "v1.1"),
        text.replace("jpg", "png"),
        text.replace("v1.2 6", "v1.2 5"),
        text.replace(words[3], "9" * len(words[3]), 1),
        text.replace(words[4], "x" * len(words[4]), 1),
        text.replace(f"{first}\n{second}", f"{second}\n{first}"),
        "?" * len(text),
    ]
    for content in wrong:
        assert len(content) == len(text) and content != text
        index.write_text(content)
        with pytest.raises(DataError, match=r"shard-000001\.idx is not an index that belongs to"):
            open_source(copied)


def test_manifests_that_do_not_fit_are_refused(copied: Path) -> None:
    manifest = copied / "manifest.json"
    whole = manifest.read_text()
    for change, message in [
        (lambda content: content.update(images=25), r"belongs to another dataset .* \(25 images, not 24\)"),
        (lambda content: content.pop("files"), r"does not list the files of shards"),
        (lambda content: content.update(files=[3]), r"does not list the files of shards"),
        (lambda content: content.update(files=[]), r"belongs to another dataset"),
        (lambda content: content.pop("classes"), r"not a manifest with a list 'classes'"),
        (lambda content: content.update(classes=[]), r"is not an index that belongs to"),
    ]:
        edit(manifest, change)
        with pytest.raises(DataError, match=message):
            open_source(copied)
        manifest.write_text(whole)
    manifest.unlink()
    with pytest.raises(DataError, match=r"without manifest\.json; run `fastbarlow convert .*/x "):
        open_source(copied)


def test_labels_out_of_range_are_named(copied: Path) -> None:
    edit(copied / "manifest.json", lambda content: content.update(classes=["ant", "bee"]))
    source = open_source(copied)
    assert source.labels(np.array([15, 0])).tolist() == [1, 0]
    with pytest.raises(DataError, match=r"sample \d+ of .*tar has no label from 0 to 1 beside it"):
        source.labels(np.arange(24))
    start = int(source._label_start_N[3])
    tar = copied / "shard-000000.tar"
    with tar.open("r+b") as file:
        file.seek(start)
        file.write(b"\xb2")  # a superscript two in Latin-1, a digit to some
    with pytest.raises(DataError, match=r"sample 3 of .*tar has no label"):
        open_source(copied).labels(np.array([3]))


def test_files_that_shrink_or_vanish_later_are_named(copied: Path) -> None:
    source, tar = open_source(copied), copied / "shard-000003.tar"
    os.truncate(tar, 600)
    reads = (lambda: source.encoded(20), lambda: source.sizes(np.array([20])), lambda: source.labels_N)
    for read in reads:
        with pytest.raises(DataError, match=r"sample 20 .*cut short|sample \d+ of .*3\.tar cannot be read"):
            read()
    tar.unlink()
    source.read_ahead(np.array([20]))  # no more than a hint
    for read in reads:
        with pytest.raises(DataError, match=r"3\.tar cannot be read \(No such file or directory\)"):
            read()
    assert source.encoded(0).size  # the others are still there


def test_groups_cover_the_samples_and_are_asked_for_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.source.shards.GROUP_BYTES", 4096)
    rng = np.random.default_rng(3)
    images = [rng.bytes(int(rng.integers(100, 3000))) for _ in range(50)]
    source = open_source(write_shard(tmp_path / "x", images))
    assert source.group_sizes_G.sum() == 50 and source.group_sizes_G.min() >= 1
    assert 10 < len(source.group_sizes_G) < 40
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, advice: asked.append((start, length)))
    source.read_ahead(np.array([7, 30, 8]))
    source.read_ahead(np.array([30, 7]))
    assert len(asked) in (2, 3)
    source.read_ahead(np.arange(50))
    assert len(asked) == len(source.group_sizes_G)
    data = (tmp_path / "x" / "shard-000000.tar").read_bytes()
    fetched = [data[start : start + length] for start, length in asked]
    assert all(any(image in piece for piece in fetched) for image in images)


@pytest.mark.timeout(60)
def test_a_million_samples_open_and_shuffle(tmp_path: Path) -> None:
    """A thousand tar files that are mostly holes; labels and a few headers are really there."""
    per_shard, num_shards, step = 1000, 1000, 2048
    image, classes = jpeg((3, 2)), [str(label) for label in range(1000)]
    places = np.arange(per_shard) * step + 512
    name = "{0:09}.jpg"
    lines = "".join(f"jpg {p} {len(image)} {name} cls {p + 1024} 3 {name}\n" for p in places.tolist())
    index = f"v1.2 {per_shard}\n{lines}".encode()
    files = []
    for shard in range(num_shards):
        stem = tmp_path / f"shard-{shard:06}"
        stem.with_suffix(".idx").write_bytes(index)
        with stem.with_suffix(".tar").open("wb") as tar:
            tar.truncate(per_shard * step)
            if shard % 100 == 7:
                for place in places.tolist():
                    tar.seek(place)
                    tar.write(image.ljust(1024, b"\0") + b"%03d" % shard)
        files += [{"file": f"{stem.name}.tar", "bytes": per_shard * step}]
        files += [{"file": f"{stem.name}.idx", "bytes": len(index)}]
    content = {"classes": classes, "images": per_shard * num_shards, "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    source = open_source(tmp_path)
    assert len(source) == 1_000_000
    permutation = epoch_permutation(len(source), seed=1, epoch=2, group_sizes_G=source.group_sizes_G)
    assert (np.bincount(permutation) == 1).all()
    assert len(source.group_sizes_G) > WINDOW  # so that it is another order than without groups
    assert (permutation != epoch_permutation(len(source), seed=1, epoch=2)).any()
    real = np.flatnonzero(np.arange(len(source)) // per_shard % 100 == 7)
    np.testing.assert_array_equal(source.labels(real), real // per_shard)
    heights, widths = source.sizes(real[::7])
    assert (heights == 2).all() and (widths == 3).all()
    assert read_image(source, int(real[-1])).size == (3, 2)
