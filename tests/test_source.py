"""Folders give the samples that torchvision gives, and every path that is no dataset is explained."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from pipelines.errors import DataError
from pipelines.source import FolderSource, open_source, read_image


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


def test_paths_without_a_dataset_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"There is no dataset at .*nowhere"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is empty"):
        open_source(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"?")
    with pytest.raises(DataError, match=r"no class sub-folders"):
        open_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no images"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"a\.txt is neither a folder nor a \.beton file"):
        open_source(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        open_source(tmp_path / ("x" * 300))


def test_folder_without_permission_is_explained(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # the superuser may read everything
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        open_source(tmp_path)


def test_folder_of_images_alone_has_no_labels(image_folder, tmp_path):
    files = sorted(image_folder.rglob("*.jpg"))
    for file in files:
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(tmp_path)
    assert source.classes == []
    assert source.labels(np.array([3, 1])).tolist() == [0, 0]
    assert source.labels_N.tolist() == [0] * len(files)
    names = sorted(file.name for file in files)
    assert [source.name(i) for i in range(len(source))] == [str(tmp_path / name) for name in names]
    assert read_image(source, 4).size == Image.open(tmp_path / names[4]).size
    from tools.convert.sources import open_image_set  # decides alike

    listed = open_image_set(tmp_path)
    assert (listed.classes, [listed.name(i) for i in range(len(listed))]) == ([], names)


def test_folders_whose_layout_says_nothing_are_refused(image_folder, tmp_path):
    """The same ones that a conversion refuses."""
    from tools.convert.sources import open_image_set

    both, parts = tmp_path / "both", tmp_path / "parts"
    shutil.copytree(image_folder, both)
    shutil.copy(image_folder / "ant" / "00.jpg", both)
    for part in ("train", "val"):
        shutil.copytree(image_folder / "ant", parts / part)
    with pytest.raises(DataError, match=r"images and also sub-folders such as ant; .* --unlabelled"):
        open_source(both)
    with pytest.raises(DataError, match=r"holds the parts train, val of a dataset.*such as .*parts/train"):
        open_source(parts)
    for folder in (both, parts):
        with pytest.raises(DataError):
            open_image_set(folder)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (20_000, 9_500)])
def test_smallest_and_largest_images_load(size, tmp_path):
    """20,000 x 9,500 pixels are more than Pillow takes by itself."""
    (tmp_path / "c").mkdir()
    Image.new("RGB", size, (200, 30, 40)).save(tmp_path / "c" / "0.jpg")
    source = open_source(tmp_path)
    assert [side.tolist() for side in source.sizes(np.array([0]))] == [[size[1]], [size[0]]]
    image = read_image(source, 0)
    assert image.size == size
    assert np.abs(np.array(image.getpixel((0, 0))) - (200, 30, 40)).max() <= 3


STUBS = [b"", b"\xff\xd8", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xc0\0\x0b", b"II*\0\x08\0\0\0"]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("data", STUBS)
def test_files_of_a_few_bytes_are_named(data, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.jpg").write_bytes(data)
    source = open_source(tmp_path)
    for read in (partial(read_image, source), lambda index: source.sizes(np.array([index]))):
        with pytest.raises(DataError, match=r"^The image .*c/0\.jpg cannot be read \(.+\); remove it"):
            read(0)


def test_a_folder_in_the_place_of_an_image_is_named(image_folder, tmp_path):
    shutil.copytree(image_folder / "ant", tmp_path / "ant")
    source = open_source(tmp_path)
    file = Path(source.name(2))
    file.unlink()
    file.mkdir()
    for read in (source.encoded, partial(read_image, source)):
        with pytest.raises(DataError, match=rf"{file.name} cannot be read \(Is a directory\)"):
            read(2)


def test_an_image_that_was_changed_after_its_size_was_read_is_refused(image_folder, tmp_path):
    """The crop boxes would be those of another image, and reach beyond it without an error."""
    shutil.copytree(image_folder / "ant", tmp_path / "ant")
    source = open_source(tmp_path)
    source.sizes(np.array([0]))
    Image.new("RGB", (7, 5)).save(source.name(0))
    with pytest.raises(DataError, match=r"is of 7 x 5 pixels, not \d+ x \d+ as stated"):
        read_image(source, 0)


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
