"""Promises of `tools.convert`: complete, ordered, readable by stock FFCV, or nothing at all."""

import errno
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from pipelines.errors import DataError
from tools.convert import convert
from tools.convert.images import ImageFile, find_fault
from tools.convert.manifest import Manifest, manifest_path, save_manifest
from tools.processes import PROCESSES, run_processes


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


def noise_folder(tmp_path: Path, side: int, ending: str) -> Path:
    """240 files of noise in two classes, links to six images that are `side` pixels high."""
    rng = np.random.default_rng(2)
    for i in range(6):
        noise = rng.integers(0, 256, (side, side + i, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.{ending}")
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(120):
            (tmp_path / "images" / label / f"{i:03}.{ending}").symlink_to(tmp_path / f"{i % 6}.{ending}")
    return tmp_path / "images"


@pytest.fixture
def heavy_folder(tmp_path: Path) -> Path:
    """Enough for several pages of the dataset file and both workers."""
    return noise_folder(tmp_path, 300, "bmp")


@pytest.fixture
def slow_folder(tmp_path: Path) -> Path:
    """Takes a worker seconds to read, so that it is at work whenever it is looked at."""
    return noise_folder(tmp_path, 900, "png")


def stored(path: Path) -> list[tuple[int, bytes]]:
    """(label, JPEG bytes) of each sample in order, through stock FFCV's reader."""
    from ffcv.reader import Reader

    reader = Reader(str(path))
    image_name, label_name = reader.metadata.dtype.names
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    data = path.read_bytes()
    return [
        (int(row[label_name]), data[(start := int(row[image_name]["data_ptr"])) : start + sizes[start]])
        for row in reader.metadata
    ]


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(float)


def read_manifest(path: Path) -> Manifest:
    return Manifest.model_validate_json(path.read_bytes())


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100
    )


def files_beside(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir() if entry.is_file()}


def test_samples_follow_the_order_of_image_folder(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.beton"
    manifest = convert(folder, target, workers=2, quality=95)
    reference = ImageFolder(str(folder), allow_empty=True)
    samples = stored(target)
    assert [label for label, _ in samples] == reference.targets
    for (_, jpeg), (path, _) in zip(samples, reference.samples, strict=True):
        assert np.abs(pixels(jpeg) - np.asarray(Image.open(path).convert("RGB"))).mean() < 3
    assert list(manifest.classes) == reference.classes == ["a", "b", "c c", "d"]
    assert manifest.images_per_class == {"a": 3, "b": 2, "c c": 2, "d": 0}
    assert manifest.images == 7
    assert manifest.left_out == ()
    assert manifest == read_manifest(tmp_path / "x.manifest.json")
    assert files_beside(target) == {"x.beton", "x.manifest.json"}


@pytest.mark.parametrize("decoder", ["simple", "center_crop"])
def test_stock_ffcv_loader_opens_the_dataset(decoder: str, tmp_path: Path) -> None:
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    rng = np.random.default_rng(3)
    images = [smooth_image(rng, 40, 40) for _ in range(5)]
    for i, image in enumerate(images):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    convert(tmp_path / "images", tmp_path / "x.beton", workers=1, quality=95)
    decoders = {"simple": SimpleRGBImageDecoder(), "center_crop": CenterCropRGBImageDecoder((40, 40), 1.0)}
    loader = Loader(
        str(tmp_path / "x.beton"),
        batch_size=5,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        pipelines={"image": [decoders[decoder]], "label": [IntDecoder()]},
    )
    [(image_NHWC, label_N1)] = list(loader)
    assert label_N1[:, 0].tolist() == [0, 0, 0, 1, 1]
    for got_HWC, i in zip(image_NHWC, [0, 2, 4, 1, 3], strict=True):
        assert np.abs(got_HWC.astype(float) - np.asarray(images[i])).mean() < 3


def test_dataset_does_not_depend_on_the_number_of_workers(heavy_folder: Path, tmp_path: Path) -> None:
    convert(heavy_folder, tmp_path / "one.beton", workers=1)
    convert(heavy_folder, tmp_path / "two.beton", workers=2)
    one, two = stored(tmp_path / "one.beton"), stored(tmp_path / "two.beton")
    assert one == two
    assert len(one) == 240
    assert sum(len(jpeg) for _, jpeg in one) > 2 * 2**23  # more than two pages of the file
    widths = [Image.open(io.BytesIO(jpeg)).width for _, jpeg in two]
    assert widths == [300 + i % 6 for i in range(120)] * 2


def test_larger_images_are_shrunk_to_max_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i, size in enumerate([(200, 100), (50, 300), (64, 10)]):
        smooth_image(rng, *size).save(tmp_path / "images" / "a" / f"{i}.png")
    manifest = convert(tmp_path / "images", tmp_path / "x.beton", max_side=64, quality=80, workers=2)
    sizes = [Image.open(io.BytesIO(jpeg)).size for _, jpeg in stored(tmp_path / "x.beton")]
    assert sizes == [(64, 32), (10, 64), (64, 10)]
    assert (manifest.settings.max_side, manifest.settings.quality) == (64, 80)


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
    [(_, jpeg)] = stored(tmp_path / "x.beton")
    assert np.abs(pixels(jpeg) - expected).max() <= 3


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
    Image.new("L", (65536, 200)).save(folder / "b" / "wide.png")
    Image.new("L", (1000, 1)).save(folder / "b" / "line.png")
    target = tmp_path / "x.beton"
    manifest = convert(folder, target, workers=2)
    reasons = {entry.file: entry.reason for entry in manifest.left_out}
    expected = {
        "a/cut.jpg": "truncated",
        "a/empty.jpg": "empty",
        "a/text.jpg": "not an image",
        "a/notes.txt": "does not end in",
        "b/gone.jpg": "leads nowhere",
        "b/pipe.jpg": "not a file",
        "b/wide.png": "exceeds 65535",
        "b/line.png": "nothing is left",
    }
    assert reasons.keys() == expected.keys()
    for name, words in expected.items():
        assert words in reasons[name]
    assert [label for label, _ in stored(target)] == [0, 0, 0, 1, 1, 2, 2]
    assert manifest.images == 7
    assert read_manifest(manifest_path(target)).left_out == manifest.left_out


def test_file_names_outside_utf8_reach_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "images" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    smooth_image(np.random.default_rng(6), 20, 20).save(folder / "0.png")
    (folder / os.fsdecode(b"\xff.png")).touch()
    convert(tmp_path / "images", tmp_path / "x.beton", workers=1)
    manifest = read_manifest(tmp_path / "x.manifest.json")
    assert manifest.classes == ("caf\\xe9",)
    assert manifest.left_out[0].file == "caf\\xe9/\\xff.png"


def test_conversion_prints_nothing_and_reports_progress(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "a" / "empty.jpg").touch()
    calls: list[tuple[int, int]] = []
    convert(folder, tmp_path / "x.beton", workers=2, progress=lambda *call: calls.append(call))
    assert capfd.readouterr() == ("", "")
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {16}
    assert calls[-1] == (16, 16)


@pytest.mark.parametrize(
    ("prepare", "target", "settings", "words"),
    [
        (lambda p: None, "x.beton", {}, "does not exist"),
        (lambda p: p.write_text("a file"), "x.beton", {}, "cannot be read: Not a directory"),
        (lambda p: p.mkdir(), "x.beton", {}, "is empty"),
        (lambda p: (p.mkdir(), (p / "0.jpg").touch()), "x.beton", {}, "has no sub-folders"),
        (lambda p: (p / "a").mkdir(parents=True), "x.beton", {}, "no usable image in its 1 classes;"),
        (lambda p: ((p / "a").mkdir(parents=True), (p / "a" / "0.jpg").touch()), "x.beton", {}, "(a/0.jpg: "),
        (lambda p: (p / "a").mkdir(parents=True), "x.ffcv", {}, "must end in .beton"),
        (
            lambda p: (p / "a").mkdir(parents=True),
            ".",
            {},
            "target . must end in .beton; name a file such as d",
        ),
        (lambda p: (p / "a").mkdir(parents=True), "/", {}, "a file such as /dataset.beton"),
        (
            lambda p: ((p / "a").mkdir(parents=True), (p / "a" / "0.jpg").touch()),
            "images/a/0.jpg/x.beton",
            {},
            "cannot be written to images/a/0.jpg/x.beton",
        ),
        (lambda p: (p / "a").mkdir(parents=True), "/proc/x.beton", {}, "cannot be written to /proc/x.beton"),
        (
            lambda p: (p / "a").mkdir(parents=True),
            "x.beton",
            {"quality": 0},
            "quality must be between 1 and 100",
        ),
        (
            lambda p: (p / "a").mkdir(parents=True),
            "x.beton",
            {"workers": 0},
            "workers must be between 1 and 256",
        ),
        (lambda p: (p / "a").mkdir(parents=True), "x.beton", {"max_side": 9999}, "max_side must be between"),
    ],
)
def test_bad_input_gets_one_sentence(
    prepare, target: str, settings: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        convert(tmp_path / "images", Path(target), **{"workers": 1} | settings)
    caught.match(words if ".*" in words else words.replace("(", r"\("))
    assert "\n" not in str(caught.value)
    assert files_beside(tmp_path / "x.beton") <= {"images"}


@pytest.mark.parametrize("phase", ["check", "write"])
def test_interrupt_leaves_the_old_dataset_and_no_processes(
    phase: str, heavy_folder: Path, folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "x.beton"
    target.parent.mkdir()
    target.write_text("the old dataset")

    def interrupt(done: int, total: int) -> None:
        if done >= (1 if phase == "check" else total // 2 + 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(heavy_folder, target, workers=2, progress=interrupt)
    assert target.read_text() == "the old dataset"
    assert files_beside(target) == {"x.beton"}
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("phase", ["check", "write"])
def test_killed_worker_ends_the_conversion(phase: str, slow_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "x.beton"
    target.parent.mkdir()
    killed = []

    def kill_one(done: int, total: int) -> None:
        if not killed and done >= (1 if phase == "check" else total // 2 + 1):
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    with pytest.raises(DataError, match=r"worker process died"):
        convert(slow_folder, target, workers=2, progress=kill_one)
    assert files_beside(target) == set()
    assert multiprocessing.active_children() == []


def test_image_that_vanishes_during_the_conversion_ends_it(folder: Path, tmp_path: Path) -> None:
    def remove(done: int, total: int) -> None:
        if done == total // 2:
            (folder / "b" / "2.jpg").unlink(missing_ok=True)

    with pytest.raises(DataError, match=r"b/2\.jpg changed or vanished"):
        convert(folder, tmp_path / "x.beton", workers=2, progress=remove)
    assert files_beside(tmp_path / "x.beton") == set()


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_check_finds_a_damaged_dataset(damage: str, folder: Path, tmp_path: Path) -> None:
    from tools.convert.writer import check_beton

    target = tmp_path / "x.beton"
    convert(folder, target, workers=1)
    labels = [label for label, _ in stored(target)]
    check_beton(target, labels)
    data = bytearray(target.read_bytes())
    if damage == "cut":
        del data[len(data) - 1000 :]
    else:
        start = data.index(stored(target)[3][1])
        data[start : start + 100] = bytes(100)
    target.write_bytes(data)
    with pytest.raises(DataError, match="not whole"):
        check_beton(target, labels)


def test_manifest_is_read_back(folder: Path, tmp_path: Path) -> None:
    manifest = convert(folder, tmp_path / "x.beton", workers=1)
    save_manifest(manifest, tmp_path / "copy.json")
    assert read_manifest(tmp_path / "copy.json") == manifest
    assert manifest.versions.keys() >= {"fastbarlow", "ffcv", "pillow", "opencv", "python"}


def test_conversion_leaves_torch_its_threads(folder: Path, tmp_path: Path) -> None:
    script = f"""
import torch
torch.set_num_threads(2)
from pathlib import Path
from tools.convert import convert
convert(Path({str(folder)!r}), Path({str(tmp_path / "x.beton")!r}), workers=1)
assert torch.get_num_threads() == 2, torch.get_num_threads()
"""
    result = run_script(script)
    assert result.returncode == 0, result.stderr


def test_folders_of_the_target_are_created(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "data" / "new" / "x.beton"
    convert(folder, target, workers=1)
    assert len(stored(target)) == 7


def test_remains_of_a_killed_conversion_are_overwritten(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.beton"
    for name in (".x.beton.part", ".x.manifest.json.part"):
        (tmp_path / name).write_bytes(b"remains" * 10**6)
    convert(folder, target, workers=1)
    assert len(stored(target)) == 7
    assert files_beside(target) == {"x.beton", "x.manifest.json"}


def test_two_conversions_do_not_share_a_target(folder: Path, tmp_path: Path) -> None:
    target, errors = tmp_path / "x.beton", []

    def convert_again(done: int, total: int) -> None:
        if not errors:
            with pytest.raises(DataError, match=r"Another conversion to .*x\.beton is running") as caught:
                convert(folder, target, workers=1)
            errors.append(caught.value)

    manifest = convert(folder, target, workers=1, progress=convert_again)
    assert len(errors) == 1
    assert len(stored(target)) == manifest.images == 7
    assert files_beside(target) == {"x.beton", "x.manifest.json"}


def test_full_disk_leaves_the_old_dataset(heavy_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the dataset's second page does not fit."""
    target = tmp_path / "out" / "x.beton"
    target.parent.mkdir()
    target.write_text("the old dataset")
    script = f"""
import resource
from pathlib import Path
from pipelines.errors import DataError
from tools.convert import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, 10 << 20))
try:
    convert(Path({str(heavy_folder)!r}), Path({str(target)!r}), workers=2)
except DataError as error:
    print(error)
"""
    result = run_script(script)
    assert (result.returncode, result.stderr) == (0, "")
    assert "File too large" in result.stdout and "free disk space" in result.stdout
    assert result.stdout.count("\n") == 1
    assert target.read_text() == "the old dataset"
    assert files_beside(target) == {"x.beton"}


def test_process_that_cannot_be_started_is_no_full_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = PROCESSES.Process.start, []

    def start_one(process: multiprocessing.Process) -> None:
        if started:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(process)
        start(process)

    monkeypatch.setattr(PROCESSES.Process, "start", start_one)
    with pytest.raises(DataError, match=r"cannot be started \(Resource temporarily .* use fewer workers"):
        convert(folder, tmp_path / "x.beton", workers=2)
    assert files_beside(tmp_path / "x.beton") == set()
    assert multiprocessing.active_children() == []


def test_no_more_processes_than_images(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def count(jobs: Sequence[Callable], poll: Callable[[], None]) -> list:
        counts.append(len(jobs))
        return run_processes(jobs, poll)

    monkeypatch.setattr("tools.convert.images.run_processes", count)
    convert(folder, tmp_path / "x.beton", workers=2)
    shutil.rmtree(folder / "a")
    shutil.rmtree(folder / "b")
    convert(folder, tmp_path / "x.beton", workers=5)
    assert counts == [2, 2]


def test_each_worker_gets_its_own_images_only(
    heavy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tools.convert.writer

    shares = []

    def record(jobs: Sequence[partial], poll: Callable[[], None]) -> list:
        shares.extend(set(job.args[-1].files) for job in jobs)
        return run_processes(jobs, poll)

    monkeypatch.setattr(tools.convert.writer, "run_processes", record)
    convert(heavy_folder, tmp_path / "x.beton", workers=2)
    assert sorted([*shares[0], *shares[1]]) == list(range(240))


def test_lack_of_memory_is_not_blamed_on_the_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path) -> None:
        raise MemoryError

    monkeypatch.setattr("tools.convert.images.decode_rgb", fail)
    with pytest.raises(MemoryError):
        find_fault(ImageFile(str(folder / "a" / "x.JPG"), 0), 512)


def test_ctrl_c_is_kept_from_the_fork_server() -> None:
    """While it imports, it would print a traceback."""
    run_processes([partial(int)], lambda: None)
    pid = multiprocessing.forkserver._forkserver._forkserver_pid
    status = Path(f"/proc/{pid}/status").read_text()
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    assert blocked >> (signal.SIGINT - 1) & 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_real_images_are_converted(shared_data: Path, tmp_path: Path) -> None:
    import tarfile

    archive = shared_data / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip("no sample of ImageNet beside the checkout")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    manifest = convert(tmp_path / "train", tmp_path / "x.beton", workers=2)
    samples = stored(tmp_path / "x.beton")
    assert manifest.images == len(samples) == len(ImageFolder(str(tmp_path / "train")))
    assert max(max(Image.open(io.BytesIO(jpeg)).size) for _, jpeg in samples) <= 512
