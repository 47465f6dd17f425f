"""The benchmark of the loaders: fair turns, honest figures, the authors' data path, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner

from pipelines.augment.reference import crop_and_resize, distort_one
from pipelines.config import AugmentConfig, DataConfig, ViewConfig
from pipelines.draw import draw_views
from pipelines.errors import DataError
from pipelines.source import open_source
from tools.bench import loader as bench
from tools.bench import loader_authors, loader_measure, loader_stages, timing
from tools.bench.loader import bench_loaders
from tools.bench.loader_authors import TwoViews, authors_loader, image_folder
from tools.bench.loader_measure import Contender, Setting, Turn, measure
from tools.bench.loader_stages import draw_sample, stages
from tools.bench.loader_usage import PeakMemory, cpu_seconds
from tools.cli import app

CPU = torch.device("cpu")
SETTING = Setting(image_size=33, batch_size=5, workers=2, device=CPU, augment=AugmentConfig())
FIGURES = {
    "pairs_per_second",
    "all_pairs_per_second",
    "cores_used",
    "all_cores_used",
    "pairs_per_core_second",
}
FIELDS = FIGURES | {"loader", "delivers", "ratio_to_authors", "share_of_decode_floor", "peak_memory_mb"}


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process and no thread more than before."""
    processes, threads = set(psutil.Process().children(recursive=True)), set(threading.enumerate())
    yield
    assert set(psutil.Process().children(recursive=True)) <= processes
    assert set(threading.enumerate()) <= threads


def run_command(*arguments: object) -> tuple[dict, str]:
    result = CliRunner().invoke(app, ["bench", "loader", *map(str, arguments), "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def test_rows_figures_and_verdict_agree(
    beton: Path, nothing_left: None, check_figures: Callable[[dict, int], None]
) -> None:
    options = ["--size", 33, "--batch", 5, "--workers", 2, "--repeats", 2, "--seconds", 0.1]
    report, printed = run_command(beton, *options)
    check_figures(report, 2)
    loaders = [(name, delivers) for name in ("folder", "ffcv", "dali") for delivers in ("crops", "views")]
    rows = {(row["loader"], row["delivers"]): row for row in report["rows"]}
    assert list(rows) == [("authors", "views"), *loaders]
    stage_rows = {row["stage"]: row for row in report["stages"]}
    assert list(stage_rows) == ["decode", "crop", "augment"]
    authors, floor = (
        np.array(row["all_pairs_per_second"]) for row in (rows["authors", "views"], stage_rows["decode"])
    )
    for row in [*rows.values(), *stage_rows.values()]:
        rates, cores = row["all_pairs_per_second"], row["all_cores_used"]
        assert len(rates) == len(cores) == 2 and min(*rates, *cores) > 0
        assert row["pairs_per_second"] == median(rates) and row["cores_used"] == median(cores)
        assert row["pairs_per_core_second"] == pytest.approx(np.median(np.divide(rates, cores)))
    for row in rows.values():
        assert row.keys() == FIELDS
        rates = np.array(row["all_pairs_per_second"])
        assert row["ratio_to_authors"] == pytest.approx(np.median(rates / authors))
        assert row["share_of_decode_floor"] == pytest.approx(np.median(rates / floor))
        assert row["peak_memory_mb"] >= 0
    assert all(row.keys() == FIGURES | {"stage", "device"} for row in stage_rows.values())
    assert (report["images"], report["workers"], report["repeats"]) == (24, 2, 2)
    assert report["unavailable"] == {} and report["environment"]["device"] == "CPU"

    best = max((key for key in loaders if key[1] == "views"), key=lambda key: rows[key]["pairs_per_second"])
    slowest = min(stage_rows, key=lambda name: stage_rows[name]["pairs_per_second"])
    sentence = printed.splitlines()[-1]
    assert sentence == report["limit"]["sentence"]
    assert f"(loader {best[0]}, 2 workers): its slowest stage is {slowest}," in sentence
    assert f"at most {rows[best]['pairs_per_second']:.0f} pairs/s" in sentence


def rows_of(**rates: float) -> list[dict]:
    return [
        dict(zip(("loader", "delivers"), name.split("_"), strict=True)) | {"pairs_per_second": rate}
        for name, rate in rates.items()
    ]


def test_verdict_is_about_what_the_step_takes() -> None:
    rows = rows_of(
        authors_views=900.0, ffcv_crops=500.0, ffcv_views=210.4, dali_crops=400.0, dali_views=300.6
    )
    stages = [
        {"stage": name, "pairs_per_second": rate}
        for name, rate in (("decode", 800.0), ("augment", 350.0), ("crop", 700.0))
    ]
    assert bench._limit(rows, stages, SETTING)["sentence"] == (
        "This machine feeds a step of at most 301 pairs/s (loader dali, 2 workers): "
        "its slowest stage is augment, alone 350 pairs/s."
    )
    on_gpu = Setting(33, 5, 16, torch.device("cuda"), AugmentConfig())
    limit = bench._limit(rows, [*stages, {"stage": "copy", "pairs_per_second": 9e4}], on_gpu)
    assert limit["sentence"] == (
        "This machine feeds a step of at most 500 pairs/s (loader ffcv, 16 workers): "
        "its slowest stage is crop, alone 700 pairs/s."
    )
    assert (limit["needs"], limit["stage"], limit["pairs_per_second"]) == ("crops", "crop", 500.0)
    assert bench._limit(rows, [], SETTING)["sentence"].endswith("(loader dali, 2 workers).")


def test_the_gpus_stages_take_no_cores() -> None:
    turns = [Turn(100.0, 0.5)]
    stage = Contender("augment", "views", lambda: None, pairs=1, warmup=0)
    assert bench._stage_row(stage, turns, torch.device("cuda"))["pairs_per_core_second"] is None
    assert bench._stage_row(stage, turns, CPU)["pairs_per_core_second"] == 200.0


def test_a_turn_counts_whole_cycles_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = [100.0], []
    monkeypatch.setattr(loader_measure.time, "perf_counter", lambda: now[0])

    @contextmanager
    def paced() -> Iterator[Iterator[int]]:
        def batches() -> Iterator[int]:
            for number in count():
                now[0] += 50.0 if number < 7 else 0.25
                taken.append(number)
                yield number

        yield batches()

    turn = measure(Contender("a", "crops", paced, pairs=8, warmup=7, cycle=3), 1.0, CPU)
    assert taken == list(range(7 + 6))  # 4 last 1 s, and the cycle is taken to its end
    assert turn.pairs_per_second == pytest.approx(8 / 0.25)
    assert turn.pairs_per_core_second == turn.pairs_per_second / turn.cores


class PacedLoader:
    """Makes a batch every `seconds` in the background, as long as fewer than `held` wait to be taken."""

    def __init__(self, seconds: float, held: int, advance: Callable[[float], None]) -> None:
        self.seconds, self.held, self.advance = seconds, held, advance

    def epoch(self, epoch: int) -> Iterator[object]:
        taken: list[float] = []
        ready = timing.time.perf_counter()
        for number in count():
            began = max(ready, taken[number - self.held]) if number >= self.held else ready
            ready = began + self.seconds
            self.advance(max(0.0, ready - timing.time.perf_counter()))
            taken.append(timing.time.perf_counter())
            yield object()

    def close(self) -> None: ...


@pytest.mark.parametrize(("prefetch", "workers"), [(1, 1), (3, 8), (16, 1)])
def test_batches_made_ahead_do_not_pass_for_speed(
    monkeypatch: pytest.MonkeyPatch, prefetch: int, workers: int
) -> None:
    now = [0.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    def build_loader(data: DataConfig, **options: object) -> PacedLoader:
        return PacedLoader(2.0, prefetch + workers - 1, advance)  # as torch's DataLoader at worst

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench, "build_loader", build_loader)
    monkeypatch.setattr(bench, "DataConfig", partial(DataConfig, prefetch=prefetch))
    setting = Setting(33, 5, workers, CPU, AugmentConfig())
    loader = bench._loader(Path("x.beton"), "folder", "crops", setting)
    assert measure(loader, 1.0, CPU).pairs_per_second == pytest.approx(5 / 2.0)


def test_folder_is_measured_in_place_and_ffcv_named_with_its_reason(
    image_folder: Path, nothing_left: None
) -> None:
    moves: list[tuple[int, int]] = []
    result = bench_loaders(
        image_folder,
        ["ffcv", "folder"],
        SETTING,
        repeats=1,
        seconds=0.01,
        progress=lambda done, total: moves.append((done, total)),
    )
    assert [row["loader"] for row in result["rows"]] == ["authors", "folder", "folder"]
    assert list(result["unavailable"]) == ["ffcv"] and str(image_folder) in result["unavailable"]["ffcv"]
    assert moves == [(n, 16) for n in range(1, 17)]  # 2 turns of 1 + 2 * 2 + 3


def test_without_a_usable_loader_there_is_only_a_sentence(image_folder: Path, nothing_left: None) -> None:
    for options, expected in (
        ([image_folder, "--only", "ffcv"], "beton"),
        ([image_folder, "--batch", 25], "at most 24"),
        ([image_folder / "nowhere"], "nowhere"),
        ([image_folder, "--only", "fastest"], "folder, ffcv, dali"),
    ):
        arguments = ["bench", "loader", *map(str, options), "--device", "cpu", "--workers", "1"]
        arguments += ["--size", "32"] + ["--batch", "5"] * ("--batch" not in options)
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        (sentence,) = result.stderr.splitlines()
        assert expected in sentence and sentence.endswith(".")


def test_authors_read_the_same_images_as_files(
    beton: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(beton)
    with loader_authors.image_folder(source) as folder:
        images = ImageFolder(str(folder))
        assert images.targets == source.labels_N.tolist()
        written = sorted(Path(path).read_bytes() for path, _ in images.samples)
        assert written == sorted(source.encoded(i).tobytes() for i in range(len(source)))
    assert not folder.exists()
    monkeypatch.setattr(loader_authors, "MAX_FILES", 7)
    with loader_authors.image_folder(source) as folder:
        names = sorted(int(file.stem) for file in folder.glob("*/*.jpg"))
        assert names == [0, 4, 8, 12, 15, 19, 23]
    with loader_authors.image_folder(open_source(image_folder)) as folder:
        assert folder == image_folder
    assert folder.exists()


def test_authors_batches_are_two_draws_of_every_image(beton: Path, nothing_left: None) -> None:
    setting = Setting(33, 12, 2, CPU, AugmentConfig())
    with image_folder(open_source(beton)) as folder, authors_loader(folder, setting).open() as stream:
        batches = list(islice(stream, 8))
    views_VBNCHW = torch.stack([torch.stack(views) for views in batches], dim=1)
    assert views_VBNCHW.shape == (2, 8, 12, 3, 33, 33) and views_VBNCHW.dtype == torch.float32
    flat_VMP = views_VBNCHW.flatten(1, 2).flatten(2)
    assert not (flat_VMP[0] == flat_VMP[1]).all(-1).any()
    assert len(flat_VMP[0].unique(dim=0)) == len(flat_VMP[0])  # and others when it comes again
    mean_C, std_C = (torch.tensor(getattr(setting.augment, name)) for name in ("mean", "std"))
    gray_levels = views_VBNCHW * std_C[:, None, None] + mean_C[:, None, None]
    assert -1e-5 < gray_levels.min() < 0.05 and 0.95 < gray_levels.max() < 1 + 1e-5
    torch.testing.assert_close(255 * gray_levels, (255 * gray_levels).round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_authors_transform_without_chance_is_the_reference(p: float) -> None:
    """The crop is a whole image; what is left to chance elsewhere is switched off, or always on."""
    options = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "jitter_p": 0, "blur_sigma": (1.3, 1.3)}
    view = ViewConfig(**options, flip_p=p, grayscale_p=p, blur_p=p, solarize_p=p)
    config = AugmentConfig(view_a=view, view_b=view)
    random = np.random.default_rng(5)
    coarse = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    image = coarse.resize((61, 61), Image.BICUBIC)
    params = draw_views(config.views, 0, 0, np.arange(1), np.array([61]), np.array([61]))
    expected = distort_one(crop_and_resize(image, (0, 0, 61, 61), 33), params, 0, 0, config)
    for ours in TwoViews(config, 33)(image):
        torch.testing.assert_close(ours, expected)


def test_authors_take_every_image_once_before_any_twice() -> None:
    order = list(islice(loader_authors._EndlessOrder(17), 51))
    rounds = [order[start : start + 17] for start in (0, 17, 34)]
    assert all(sorted(indices) == list(range(17)) for indices in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_bad_image_stops_the_authors_in_one_sentence(
    write_images: Callable[..., None], tmp_path: Path, nothing_left: None
) -> None:
    write_images(tmp_path / "images", ["a"], 5)
    (tmp_path / "images" / "a" / "1.jpg").write_bytes(b"no image")
    loader = authors_loader(tmp_path / "images", SETTING)
    with (
        pytest.raises(DataError, match=r"^The authors' loader failed \(.*1\.jpg.*\); .*\.$"),
        loader.open() as stream,
    ):
        next(stream)


def test_a_dead_worker_stops_the_authors_in_one_sentence(image_folder: Path, nothing_left: None) -> None:
    before = set(psutil.Process().children())
    with authors_loader(image_folder, SETTING).open() as stream:
        next(stream)
        worker = next(iter(set(psutil.Process().children()) - before))
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"^The authors' loader failed \([^\n]*\.$"):
            for _ in range(50):
                next(stream)


def test_stages_do_their_work(beton: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    sample = draw_sample(open_source(beton))
    source = open_source(beton)
    assert [jpeg.tobytes() for jpeg in sample.jpegs] == [source.encoded(i).tobytes() for i in range(24)]
    decoded, cropped = [], []
    real_decode, real_crop = loader_stages.decode, loader_stages.crop_and_resize

    def decode(jpeg: np.ndarray, pixels_HW3: np.ndarray) -> int:
        status = real_decode(jpeg, pixels_HW3)
        decoded.append((status, pixels_HW3.sum(), jpeg.size))
        return status

    def crop(image_HW3: np.ndarray, box: tuple[int, ...], out_SS3: np.ndarray) -> None:
        out_SS3[:] = 0xAB
        real_crop(image_HW3, box, out_SS3)
        cropped.append((box, out_SS3.tobytes()))

    monkeypatch.setattr(loader_stages, "decode", decode)
    monkeypatch.setattr(loader_stages, "crop_and_resize", crop)
    by_name = {stage.name: stage for stage in stages(sample, SETTING)}
    for name, calls in (("decode", decoded), ("crop", cropped)):
        calls.clear()
        with by_name[name].open() as stream:
            assert len(list(islice(stream, 6))) == 6
        per_pair = {"decode": 1, "crop": 2}[name]
        assert len(calls) >= 6 * by_name[name].pairs * per_pair
    sums = {(0, image.sum(), jpeg.size) for image, jpeg in zip(sample.images, sample.jpegs, strict=True)}
    assert set(decoded) == sums
    assert len(set(cropped)) > 2 * 24  # all images, and other boxes when they come again
    with by_name["augment"].open() as stream:
        first, second = islice(stream, 2)
    assert first.shape == (2, 5, 3, 33, 33) and first.dtype == torch.float32
    assert first.isfinite().all() and not torch.equal(first, second)


def test_an_error_in_a_thread_ends_the_stage(nothing_left: None) -> None:
    def work(number: int) -> None:
        if number == 100:
            raise ValueError("at 100")

    with loader_stages._in_threads(work, 3) as stream, pytest.raises(ValueError, match="at 100"):
        for _ in range(100):
            next(stream)


def test_without_jpegs_there_is_no_floor(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 40), (9 * number, 0, 0)).save(tmp_path / "a" / f"{number}.png")
    result = bench_loaders(tmp_path, ["folder"], SETTING, repeats=1, seconds=0.01)
    assert result["stages"] == [] and "no JPEG" in result["unavailable"]["stages"]
    assert [row["share_of_decode_floor"] for row in result["rows"]] == [None] * 3


BURN = """
import sys, time
held = b"x" * int(sys.argv[1])
while time.process_time() < 0.4: pass
print("done", flush=True)
sys.stdin.read()
"""


def test_cpu_time_and_memory_of_children_count(nothing_left: None) -> None:
    before = cpu_seconds()
    with PeakMemory() as peak:
        command = [sys.executable, "-c", BURN, str(100 << 20)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            alive = cpu_seconds() - before
            peak.sample()
            child.stdin.close()
    assert alive > 0.35  # of 0.4, in clock ticks
    assert cpu_seconds() - before >= alive - 0.02
    assert 100 < peak.bytes / 2**20 < 150


def test_memory_is_what_comes_on_top() -> None:
    held = np.ones(200 << 20, np.uint8)
    with PeakMemory() as peak:
        more = np.ones(50 << 20, np.uint8)
    assert 49 < peak.bytes / 2**20 < 80
    del held, more


def test_pages_that_a_fork_shares_count_once() -> None:
    held = np.ones(200 << 20, np.uint8)
    with PeakMemory() as peak:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        peak.sample()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert peak.bytes / 2**20 < 100
    del held


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_batches_arrive_there_and_copying_is_a_stage(beton: Path) -> None:
    setting = Setting(33, 5, 2, torch.device("cuda"), AugmentConfig())
    with image_folder(open_source(beton)) as folder, authors_loader(folder, setting).open() as stream:
        assert {view.device.type for view in next(stream)} == {"cuda"}
    result = bench_loaders(beton, ["folder", "ffcv", "dali"], setting, repeats=2, seconds=0.1)
    assert result["unavailable"] == {} and len(result["rows"]) == 7
    assert [row["stage"] for row in result["stages"]] == ["decode", "crop", "augment", "copy"]
    assert [row["device"] for row in result["stages"]] == ["cpu", "cpu", "cuda", "cuda"]
    assert result["limit"]["needs"] == "crops"
