"""Promises of `tools.convert`: complete, in order, the source's own bytes where they fit, and described."""

import io
import os
import re
import tarfile
import threading
import tracemalloc
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from pipelines.errors import DataError
from pipelines.source import open_source, read_image
from tools.convert import convert
from tools.convert.estimate import Estimate
from tools.convert.images import BadImage, prepare
from tools.convert.manifest import ConvertSettings, load_manifest
from tools.convert.pool import CHUNKS_AHEAD, Chunk, Memory, chunks, in_order, prepare_entries
from tools.convert.sources import open_image_set
from tools.convert.target import cut

Disk = namedtuple("Disk", "total used free")


def smooth_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An image that JPEG keeps almost unchanged: four random corner colours, blended."""
    corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    return corners.resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of differing counts, nested folders, sizes and formats; one class is empty."""
    rng = np.random.default_rng(1)
    names = ["b/2.jpg", "b/10.png", "a/z/0.jpg", "a/x.JPG", "a/m.bmp", "c c/é.webp", "c c/1.jpg"]
    for name in names:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(20, 90, 2).tolist()
        smooth_image(rng, width, height).save(path, quality=95)
    (tmp_path / "images" / "d").mkdir()
    return tmp_path / "images"


@pytest.fixture(scope="session")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 small files in two classes, links to 30 images of varied sizes, a third of them larger than 64."""
    root, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(2)
    for i in range(30):
        width, height = rng.integers(20, 90, 2).tolist()
        smooth_image(rng, width, height).save(root / f"{i}.jpg", quality=90)
    for i in range(700):
        link = root / "images" / "ab"[i % 2] / f"{i:03}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(root / f"{rng.integers(0, 30)}.jpg")
    return root / "images"


def files_beside(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir() if entry.is_file()}


def encoded(path: Path) -> list[bytes]:
    source = open_source(path)
    return [source.encoded(i).tobytes() for i in range(len(source))]


def pixels(path: Path, index: int = 0) -> np.ndarray:
    return np.asarray(read_image(open_source(path), index), dtype=float)


def contents(path: Path) -> dict[str, bytes]:
    """The files of a dataset but for the manifest."""
    files = [path] if path.is_file() else path.iterdir()
    return {file.name: file.read_bytes() for file in files if file.suffix != ".json"}


def test_samples_follow_the_order_of_image_folder(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.beton"
    manifest = convert(folder, target, workers=2, settings=ConvertSettings(quality=95))
    reference, source = ImageFolder(str(folder), allow_empty=True), open_source(target)
    assert source.labels_N.tolist() == reference.targets
    for i, (path, _) in enumerate(reference.samples):
        assert np.abs(pixels(target, i) - np.asarray(Image.open(path).convert("RGB"))).mean() < 3
    assert source.classes == list(manifest.classes) == reference.classes == ["a", "b", "c c", "d"]
    assert manifest.images_per_class == {"a": 3, "b": 2, "c c": 2, "d": 0}
    assert (manifest.images, manifest.left_out, manifest.unlabelled) == (7, (), False)
    assert files_beside(target) == {"x.beton", "x.manifest.json"}


def test_images_that_fit_are_copied_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    manifest = convert(folder, tmp_path / "x.beton", workers=2)
    samples = ImageFolder(str(folder), allow_empty=True).samples
    copied = [
        Path(path).read_bytes() == data
        for (path, _), data in zip(samples, encoded(tmp_path / "x.beton"), strict=True)
    ]
    assert copied == [Path(path).suffix.lower() == ".jpg" for path, _ in samples]
    assert manifest.images_copied == sum(copied) == 4


def test_manifest_tells_where_the_dataset_comes_from(folder: Path, tmp_path: Path) -> None:
    manifest = convert(folder, tmp_path / "x.beton", workers=1, settings=ConvertSettings(max_side=64))
    assert manifest == load_manifest(tmp_path / "x.beton")
    assert manifest.source == str(folder)
    assert manifest.settings == ConvertSettings(max_side=64)
    assert manifest.versions.keys() >= {"fastbarlow", "pillow", "torch", "python"}
    sizes = np.array([pixels(tmp_path / "x.beton", i).shape[:2] for i in range(7)])
    assert [manifest.sizes.max_height, manifest.sizes.max_width] == sizes.max(axis=0).tolist()
    assert [manifest.sizes.min_height, manifest.sizes.min_width] == sizes.min(axis=0).tolist()
    assert sum(manifest.sizes.longer_side.values()) == 7
    assert max(manifest.sizes.longer_side) == 64
    assert manifest.image_bytes == sum(map(len, encoded(tmp_path / "x.beton")))
    (file,) = manifest.files
    assert (file.file, file.samples, file.bytes) == ("x.beton", 7, (tmp_path / "x.beton").stat().st_size)


@pytest.mark.parametrize("name", ["x.beton", "x"])
def test_dataset_does_not_depend_on_the_number_of_workers(
    name: str, many_images: Path, tmp_path: Path
) -> None:
    settings, shards = ConvertSettings(max_side=64), None if name == "x.beton" else 3
    one, two = (
        convert(many_images, tmp_path / f"{n}" / name, workers=n, settings=settings, shards=shards)
        for n in (1, 5)
    )
    assert contents(tmp_path / "1" / name) == contents(tmp_path / "5" / name)
    assert one.sha256 == two.sha256
    assert one.images == 700
    assert 0 < one.images_copied < 700


def test_shards_hold_the_samples_of_the_beton(many_images: Path, tmp_path: Path) -> None:
    convert(many_images, tmp_path / "x.beton", workers=2)
    manifest = convert(many_images, tmp_path / "x", workers=2, shards=4)
    images, labels = [], []
    for shard in sorted((tmp_path / "x").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                (images if member.name.endswith(".jpg") else labels).append(tar.extractfile(member).read())
    assert images == encoded(tmp_path / "x.beton")
    assert [int(label) for label in labels] == open_source(tmp_path / "x.beton").labels_N.tolist()
    assert [file.samples for file in manifest.files if file.file.endswith(".tar")] == [175] * 4
    assert manifest == load_manifest(tmp_path / "x")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("storage", ["jpg", "mixed", "raw"])
@pytest.mark.parametrize("check", ["structure", "decode"])
def test_images_read_together_are_as_if_read_alone(
    check: str, storage: str, packed: bool, many_images: Path, tmp_path: Path
) -> None:
    """Those to copy, with bytes after the end or with a lost block, and those to encode anew or leave out."""
    root, rng = tmp_path / "images", np.random.default_rng(12)
    for i, path in enumerate(sorted(many_images.glob("*/*"))[:60]):
        data = path.read_bytes()
        kinds = {7: data + rng.bytes(99), 11: data[:-40], 13: b"", 17: b"no image", 19: data + b"\xff"}
        lost = data[:-300] + bytes(200) + data[-100:]
        content = {**kinds, 23: lost}.get(i % 24, data)
        (root / "a").mkdir(parents=True, exist_ok=True)
        (root / "a" / f"{i:02}.jpg").write_bytes(content)
    source = root
    if packed:
        source = tmp_path / "images.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(root, "images")
    images = open_image_set(source)
    images.fingerprint()  # now it knows the sizes
    settings = ConvertSettings(check=check, storage=storage, max_side=64)
    result = prepare_entries(images, settings, 1 << 23, Memory(), range(60))
    stored = cut(result.pieces, result.samples_N["size"].tolist())
    for i, (sample, reason, pieces) in enumerate(zip(result.samples_N, result.reasons, stored, strict=True)):
        try:
            alone = prepare(images.read(i), settings)
        except BadImage as error:
            assert (reason, pieces) == (str(error), [])
        else:
            assert reason is None
            assert b"".join(pieces) == alone.encoded
            assert tuple(sample)[:4] == (alone.is_raw, alone.was_copied, alone.height, alone.width)
    assert 5 < sum(why is not None for why in result.reasons) < 15
    assert (result.samples_N["was_copied"].sum() > 10) == (storage != "raw")


@pytest.mark.parametrize("change", ["grows", "shrinks", "goes", "is a pipe", "is a folder", "is locked"])
def test_file_that_changes_while_it_is_read_is_taken_as_it_is(change: str, folder: Path) -> None:
    images = open_image_set(folder)
    images.fingerprint()
    file, before = folder / "a" / "x.JPG", (folder / "a" / "x.JPG").read_bytes()
    if change == "is locked":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        file.chmod(0)
    else:
        file.unlink()
    if change in ("grows", "shrinks"):
        file.write_bytes(before + b"more" if change == "grows" else before[:-1])
    elif change == "is a pipe":
        os.mkfifo(file)
    elif change == "is a folder":
        file.mkdir()
    result = prepare_entries(images, ConvertSettings(), 1 << 23, Memory(), range(len(images)))
    assert [i for i, why in enumerate(result.reasons) if why] == ([1] if change != "grows" else [])
    images_in = list(cut(result.pieces, result.samples_N["size"].tolist()))
    assert b"".join(images_in[1]) == (before if change == "grows" else b"")
    for index in (2, 3, 6):  # the others are not disturbed
        if images.name(index).endswith("jpg"):
            assert b"".join(images_in[index]) == (folder / images.name(index)).read_bytes()


def test_larger_images_are_shrunk_to_max_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i, size in enumerate([(200, 100), (50, 300), (64, 10)]):
        smooth_image(rng, *size).save(tmp_path / "images" / "a" / f"{i}.png")
    convert(tmp_path / "images", tmp_path / "x.beton", workers=2, settings=ConvertSettings(max_side=64))
    assert [pixels(tmp_path / "x.beton", i).shape[:2] for i in range(3)] == [(32, 64), (64, 10), (10, 64)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_image_mode_is_stored_as_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "images" / "a" / ("0.tif" if mode == "CMYK" else "0.png")
    path.parent.mkdir(parents=True)
    image = Image.new("RGB", (40, 30), (255, 255, 255) if mode == "1" else (200, 60, 30))
    image = image.quantize(4) if mode == "P" else image.convert("RGB" if mode == "I;16" else mode)
    expected = np.asarray(image.convert("RGB"), dtype=float)
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 40), 0x8000, dtype=np.uint16))
        expected = np.full((30, 40, 3), 128.0)
    assert image.mode == mode
    image.save(path)
    convert(tmp_path / "images", tmp_path / "x.beton", workers=1)
    assert np.abs(pixels(tmp_path / "x.beton") - expected).max() <= 3


def test_bad_images_are_left_out_with_a_reason(folder: Path, tmp_path: Path) -> None:
    whole = io.BytesIO()
    noise = np.random.default_rng(5).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    (folder / "a" / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "a" / "empty.jpg").touch()
    (folder / "a" / "text.jpg").write_text("this is not an image")
    (folder / "a" / "notes.txt").write_text("neither is this")
    (folder / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "b" / "pipe.jpg")
    manifest = convert(folder, tmp_path / "x.beton", workers=2)
    reasons = {entry.file: entry.reason for entry in manifest.left_out}
    expected = {
        "a/cut.jpg": "truncated",
        "a/empty.jpg": "empty",
        "a/text.jpg": "not an image",
        "b/gone.jpg": "No such file",
        "b/pipe.jpg": "not a file",
    }
    assert reasons.keys() == expected.keys()
    for name, words in expected.items():
        assert words in reasons[name]
    assert open_source(tmp_path / "x.beton").labels_N.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert (manifest.images, manifest.ignored) == (7, 1)
    assert manifest.share_left_out == 5 / 12


def test_huge_file_is_left_out_without_taking_memory(folder: Path, tmp_path: Path) -> None:
    with (folder / "a" / "huge.jpg").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    manifest = convert(folder, tmp_path / "x.beton", workers=1)
    ((name, reason),) = [(entry.file, entry.reason) for entry in manifest.left_out]
    assert (name, reason) == ("a/huge.jpg", "cannot be read: 1099511627776 bytes are more than 1073741824")


def test_extreme_sizes_are_stored(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "images" / "a" / "0.jpg")
    Image.new("RGB", (20000, 20), (10, 200, 30)).save(tmp_path / "images" / "a" / "1.jpg")
    manifest = convert(tmp_path / "images", tmp_path / "x.beton", workers=2)
    assert [pixels(tmp_path / "x.beton", i).shape for i in range(2)] == [(1, 1, 3), (1, 512, 3)]
    assert np.abs(pixels(tmp_path / "x.beton", 1) - (10, 200, 30)).max() <= 3
    assert manifest.left_out == ()


def test_names_of_all_kinds_reach_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "images" / os.fsdecode(b"caf\xe9 \xc3\xa9\nb")
    folder.mkdir(parents=True)
    smooth_image(np.random.default_rng(6), 20, 20).save(folder / "0.png")
    (folder / os.fsdecode(b"\xff \xf0\x9f\x90\x9d.png")).touch()
    convert(tmp_path / "images", tmp_path / "x.beton", workers=1)
    manifest = load_manifest(tmp_path / "x.beton")
    assert manifest.classes == ("caf\\xe9 é\nb",)
    assert manifest.left_out[0].file == "caf\\xe9 é\nb/\\xff 🐝.png"


def test_images_without_labels(tmp_path: Path) -> None:
    for i in range(3):
        smooth_image(np.random.default_rng(i), 20, 20).save(tmp_path / f"{i}.jpg")
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"{i}.jpg").rename(tmp_path / "images" / f"{i}.jpg")
    manifest = convert(tmp_path / "images", tmp_path / "x.beton", workers=1)
    source = open_source(tmp_path / "x.beton")
    assert (manifest.classes, manifest.unlabelled, manifest.images_per_class) == ((), True, {})
    assert (source.classes, source.labels_N.tolist()) == ([], [0, 0, 0])
    convert(tmp_path / "images", tmp_path / "x", workers=1)
    with tarfile.open(tmp_path / "x" / "shard-000000.tar") as tar:
        assert tar.getnames() == [f"{i:09}.jpg" for i in range(3)]


@pytest.mark.parametrize("storage", ["raw", "mixed"])
def test_pixels_can_be_stored(storage: str, tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    rng = np.random.default_rng(7)
    noise_HWC = rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)  # which JPEG does not make smaller
    Image.fromarray(noise_HWC).save(tmp_path / "images" / "a" / "0.png")
    smooth_image(rng, 80, 80).save(tmp_path / "images" / "a" / "1.png")
    settings = ConvertSettings(storage=storage, raw_factor=4)
    manifest = convert(tmp_path / "images", tmp_path / "x.beton", workers=1, settings=settings)
    assert manifest.images_raw == (2 if storage == "raw" else 1)
    np.testing.assert_array_equal(pixels(tmp_path / "x.beton"), noise_HWC)


def test_conversion_is_quiet_and_reports_progress(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "a" / "empty.jpg").touch()
    calls: list[tuple[int, int]] = []
    num_threads = torch.get_num_threads()
    convert(folder, tmp_path / "x.beton", workers=2, progress=lambda *call: calls.append(call))
    assert capfd.readouterr() == ("", "")
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {8}
    assert (calls[0][0], calls[-1][0]) == (0, 8)
    assert torch.get_num_threads() == num_threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("prepare", "recorder"))]


def one_image(folder: Path) -> None:
    (folder / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "a" / "0.jpg")


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("x.ffcv", {}, "must end in .beton"),
        (".", {}, "The target . must end in .beton, or be a new folder"),
        ("/", {}, "a file such as /dataset.beton"),
        ("images/a/0.jpg/x.beton", {}, "lies inside the source"),
        ("images/x.beton", {}, "lies inside the source"),
        ("/proc/x.beton", {}, "cannot be written to /proc/x.beton (No such file"),
        ("file/x.beton", {}, "cannot be written to file/x.beton (File exists)"),
        ("file", {}, "The target file exists and is no dataset"),
        ("folder.beton", {}, "is a folder; choose another name"),
        ("x.beton", {"workers": 0}, "workers must be between 1 and 1024"),
        ("x", {"shards": 0}, "shards must be between 1 and"),
        ("x.beton", {"shards": 2}, "name a folder to get shards"),
        ("x", {"settings": ConvertSettings(storage="raw")}, "Shards hold JPEG files, not raw"),
    ],
)
def test_bad_target_gets_one_sentence(
    target: str, options: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_image(tmp_path / "images")
    (tmp_path / "file").touch()
    (tmp_path / "folder.beton").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        convert(tmp_path / "images", Path(target), **{"workers": 1} | options)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"images", "file", "folder.beton"}


@pytest.mark.parametrize("data", [b"", b"no image"])
def test_source_without_usable_images_leaves_nothing(data: bytes, tmp_path: Path) -> None:
    one_image(tmp_path / "images")
    (tmp_path / "images" / "a" / "0.jpg").write_bytes(data)
    with pytest.raises(DataError, match=r"images holds no usable image \(a/0\.jpg: .*\); put"):
        convert(tmp_path / "images", tmp_path / "out" / "x.beton", workers=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_shards_replace_older_shards_but_nothing_else(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x"
    convert(folder, target, workers=1, shards=7)
    assert len(list(target.glob("*.tar"))) == 7
    convert(folder, target, workers=1, shards=2)
    assert len(list(target.iterdir())) == 2 * 2 + 1
    assert [path.name for path in target.parent.iterdir()] == ["x"]
    (target / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"x exists and is no dataset of shards, .*; name a new folder"):
        convert(folder, target, workers=1)
    assert len(list(target.iterdir())) == 2 * 2


@pytest.mark.parametrize("manifest", ["{}", None])
def test_folder_with_other_files_is_never_replaced(
    manifest: str | None, folder: Path, tmp_path: Path
) -> None:
    """Neither one with any manifest.json, nor a dataset to which something was added."""
    target = tmp_path / "x"
    if manifest is None:
        convert(folder, target, workers=1)
    else:
        target.mkdir()
        (target / "manifest.json").write_text(manifest)
    (target / "thesis.txt").write_text("years")
    before = contents(target)
    with pytest.raises(DataError, match="holds other files too; name a new folder"):
        convert(folder, target, workers=1)
    assert contents(target) == before
    assert {path.name for path in tmp_path.iterdir()} == {"images", "x"}


def test_folder_that_fills_during_the_conversion_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    with pytest.raises(DataError, match="holds other files too; name a new folder"):
        convert(
            folder,
            target,
            workers=1,
            progress=lambda done, total: (target / "thesis.txt").write_text("years"),
        )
    assert contents(target) == {"thesis.txt": b"years"}
    (target / "thesis.txt").unlink()
    assert convert(folder, target, workers=1).images == 7


def test_link_to_the_target_stays(folder: Path, tmp_path: Path) -> None:
    """The dataset belongs where the link leads, perhaps to another disk."""
    target, link = tmp_path / "disk" / "x", tmp_path / "x"
    link.symlink_to(target)
    for shards in (2, 3):  # not there at first, then replaced
        convert(folder, link, workers=1, shards=shards)
        assert link.readlink() == target
        assert len(list(target.glob("*.tar"))) == shards
        assert [path.name for path in target.parent.iterdir()] == ["x"]
        assert {path.name for path in tmp_path.iterdir()} == {"disk", "images", "x"}


def test_what_is_read_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    folder.rename(project / "images")
    with pytest.raises(DataError, match="name a new folder"):
        convert(project / "images", project, workers=1)

    shards = tmp_path / "x"
    convert(project / "images", shards, workers=1, shards=2)
    before = contents(shards)
    names = sorted(name for name in before if name.endswith(".tar"))
    (tmp_path / "list.txt").write_text("\n".join(f"x/{name}" for name in names))
    (tmp_path / "links").mkdir()
    for name in names:
        (tmp_path / "links" / name).symlink_to(shards / name)
    (tmp_path / "link").symlink_to(shards)
    for source, target in (
        (tmp_path / "list.txt", shards),
        (tmp_path / "links", shards),
        (shards / names[0], shards),
        (shards / names[0], tmp_path / "link"),
    ):
        with pytest.raises(DataError, match=r"000\.tar lies inside .*; choose another target"):
            convert(source, target, workers=1)
    for option in ("subset", "ground_truth"):
        with pytest.raises(DataError, match=r"list lies inside .*/\.x\.old, which .* replace"):
            convert(project / "images", shards, workers=1, **{option: tmp_path / ".x.old" / "list"})
    assert contents(shards) == before
    assert convert(tmp_path / "list.txt", tmp_path / "y", workers=1).images == 7


def test_time_and_size_are_estimated_before_anything_is_written(many_images: Path, tmp_path: Path) -> None:
    known: list[Estimate] = []
    manifest = convert(many_images, tmp_path / "x.beton", workers=2, on_estimate=known.append)
    (estimate,) = known
    assert (estimate.entries, estimate.done) == (700, 0)
    assert estimate.bytes == pytest.approx(manifest.files[0].bytes, rel=0.5)
    assert estimate.seconds > 0
    assert estimate.free_bytes > 0


def test_disk_that_is_certainly_too_small_is_refused(
    many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(10**6, 0, 100_000))
    with pytest.raises(
        DataError, match=r"needs about .*[kM]B, and only 100\.0 kB are free in .*out; free some"
    ):
        convert(many_images, tmp_path / "out" / "x.beton", workers=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_few_bytes_wait_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk does not let the threads run ahead, least of all with large files."""
    monkeypatch.setattr("tools.convert.pool.CHUNK_BYTES", 100)
    rng, workers = np.random.default_rng(3), 3
    work = [Chunk(range(i, i + 1), size) for i, size in enumerate(rng.integers(1, 300, 300).tolist())]
    work[150] = Chunk(range(150, 151), 10**6)  # more than all memory
    started: list[int] = []
    with ThreadPoolExecutor(workers) as pool:
        done = []
        for result in in_order(pool, workers, lambda entries: started.append(entries[0]) or entries, work):
            done += result
            waiting = [work[i].bytes for i in sorted(started)[len(done) - 1 :]]
            assert len(waiting) <= CHUNKS_AHEAD * workers
            assert sum(waiting) <= CHUNKS_AHEAD * workers * 100 or waiting == [10**6]
    assert done == [*range(300)]


def test_chunks_take_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_image_set(folder)
    sizes = [images.size(i) for i in range(7)]
    for most in (1, max(sizes), sum(sizes) // 2, 10**9):
        monkeypatch.setattr("tools.convert.pool.CHUNK_BYTES", most)
        found = list(chunks(images, ConvertSettings(), 1, 7))
        assert [i for chunk in found for i in chunk.entries] == [1, 2, 3, 4, 5, 6]
        for chunk in found:
            assert chunk.bytes == sum(sizes[i] for i in chunk.entries)
            assert chunk.bytes <= most or len(chunk.entries) == 1
    raw = ConvertSettings(storage="raw", max_side=100)  # pixels may take more room than the file
    assert {chunk.bytes for chunk in chunks(images, raw, 0, 7)} == {7 * 30_000}
    monkeypatch.setattr("tools.convert.pool.CHUNK", 3)
    assert [len(chunk.entries) for chunk in chunks(images, raw, 0, 7)] == [3, 3, 1]


def test_memory_is_used_again_when_nobody_reads_it() -> None:
    memory = Memory()
    first = memory.take(50)
    first[:] = 7
    view = memoryview(first)[3:8]
    place = first.ctypes.data
    del first
    second = memory.take(50)  # the first is still read
    assert second.ctypes.data != place
    second[:] = 9
    assert bytes(view) == b"\7" * 5
    del view
    assert memory.take(60).ctypes.data == place


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 MB of images pass through far less."""
    noise_HWC = np.random.default_rng(8).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    file = tmp_path / "0.jpg"
    Image.fromarray(noise_HWC).save(file, quality=95)
    (tmp_path / "images").mkdir()
    for i in range(2000):
        (tmp_path / "images" / f"{i}.jpg").hardlink_to(file)
    monkeypatch.setattr("tools.convert.blocks.ENTRIES", 16)
    monkeypatch.setattr("tools.convert.pool.CHUNK_BYTES", 1 << 18)
    convert(tmp_path / "images", tmp_path / "x.beton", workers=2)  # loads what all need
    tracemalloc.start()
    manifest = convert(tmp_path / "images", tmp_path / "x.beton", workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert manifest.image_bytes > 35e6
    assert peak < 8e6


@pytest.mark.parametrize("where", ["for its chunk", "for it alone"])
def test_lack_of_memory_is_not_blamed_on_the_image(
    where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    images = open_image_set(folder)
    if where == "for its chunk":
        monkeypatch.setattr(Memory, "take", fail)
    else:
        monkeypatch.setattr(images, "read_together", lambda entries, *_: np.zeros(len(entries), bool))
        monkeypatch.setattr(images, "read", fail)
    with pytest.raises(DataError, match=r"a/m\.bmp \(out of memory\); .* fewer workers"):
        prepare_entries(images, ConvertSettings(), 10**6, Memory(), range(3))


def test_image_that_fits_no_page_is_left_out(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    images = open_image_set(folder)
    results = prepare_entries(images, ConvertSettings(), 100, Memory(), range(len(images)))
    assert all("bytes are more than the 100 that fit a page" in reason for reason in results.reasons)
    assert (results.pieces, results.num_bytes) == ([], 0)


def test_imagenet_archive_with_faulty_images(shared_data: Path, tmp_path: Path) -> None:
    """A tar of class tars as downloaded, with a PNG and a CMYK file named .JPEG and three corrupt files."""
    sample = shared_data / "imagenet-sample.tar"
    if not sample.is_file():
        pytest.skip("no sample of ImageNet beside the checkout")
    classes: dict[str, dict[str, bytes]] = {}
    with tarfile.open(sample) as tar:
        for member in tar:
            if member.isfile():
                *_, label, name = member.name.split("/")
                classes.setdefault(label, {})[name] = tar.extractfile(member).read()
    names = sorted(classes)
    some = next(iter(classes[names[0]].values()))
    png, cmyk = io.BytesIO(), io.BytesIO()
    Image.open(io.BytesIO(some)).save(png, "PNG")
    Image.open(io.BytesIO(some)).convert("CMYK").save(cmyk, "JPEG")
    good = {f"{names[1]}_1.JPEG": png.getvalue(), f"{names[1]}_2.JPEG": cmyk.getvalue()}
    bad = {"cut": some[: len(some) // 2], "empty": b"", "text": b"no image at all"}
    classes[names[1]] |= good | {f"{names[1]}_{key}.JPEG": data for key, data in bad.items()}
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in names:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name, data in sorted(classes[label].items()):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(f"{label}.tar")
            info.size = inner.tell()
            inner.seek(0)
            outer.addfile(info, inner)
    manifest = convert(tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "x.beton", workers=2)
    assert list(manifest.classes) == names
    assert {entry.file for entry in manifest.left_out} == {
        f"{names[1]}.tar/{names[1]}_{key}.JPEG" for key in bad
    }
    assert manifest.images == sum(map(len, classes.values())) - 3
    labels = [
        i for i, name in enumerate(names) for file in classes[name] if file.partition("_")[2][:-5] not in bad
    ]
    assert open_source(tmp_path / "x.beton").labels_N.tolist() == labels
    assert max(manifest.sizes.max_height, manifest.sizes.max_width) == 512
