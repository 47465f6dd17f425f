"""`fastbarlow bench all`: every benchmark on the machine at hand, in one table."""

import csv
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.config import AugmentConfig
from pipelines.loaders import LOADERS
from tools.bench.augment import bench_augment
from tools.bench.convert import bench_convert
from tools.bench.figures import Figure
from tools.bench.knn import bench_knn
from tools.bench.loader import bench_loaders
from tools.bench.loader_measure import Setting
from tools.bench.loss import bench_loss
from tools.bench.plan import bench_plan
from tools.bench.step import bench_step
from tools.convert import convert
from tools.demo_data import make_demo_images
from tools.options import DEMO_CONFIG
from train.config import RunConfig, load_config
from train.distributed import process_group
from train.errors import USER_ERRORS, ConfigError, TrainingError

HEADER = ("bench", "case", "unit", "p10", "median", "p90", "repeats", "times as fast", "as", "date")
CORES = len(os.sched_getaffinity(0))
LOADER_PAIRS, LOADER_SECONDS = 64, 3.0  # in a batch; of a turn, at least
CONVERTED_IMAGES, MAX_SIDES = 2000, (4096, 512, 256)
PLAN_RANKS = (1, 2)[:CORES]  # of one thread each
KNN_ROWS, KNN_WIDTH, KNN_QUERIES, KNN_KS = 100_000, 2048, 1000, (20, 200)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Workload:
    """What is measured, and how often."""

    config: RunConfig  # of the step; its image size, projector and precision are everybody's
    repeats: int = 5
    loss_samples: Sequence[int] = (256, 2048)

    @property
    def device(self) -> str:
        return self.config.train.device


def bench_all(
    workload: Workload,
    images: Path | None,
    names: Sequence[str] = (),
    *,
    on_bench: Callable[[str], Progress | None] = lambda name: None,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, str]:
    """Run the benchmarks of these names, or all of them, one after the other.

    `images` is what `fastbarlow convert` takes, and is converted first; images are drawn where it is None.
    `on_bench` is told of each benchmark that begins, and gives the function that its progress goes to;
    `on_result` gets each result as soon as it is there. Returns the reasons of those that this machine cannot
    run.

    Raises `ConfigError` for an unknown name, `DataError` where the images cannot be used.
    """
    unknown = next((name for name in names if name not in BENCHES), None)
    if unknown is not None:
        raise ConfigError(f"There is no benchmark {unknown!r}; choose from {', '.join(BENCHES)}.")
    names, unavailable = names or list(BENCHES), {}
    with _prepared(images) if READ_IMAGES & set(names) else nullcontext(NO_IMAGES) as (folder, dataset):
        for name in names:
            try:
                on_result(BENCHES[name](workload, folder, dataset, on_bench(name)))
            except USER_ERRORS as error:
                unavailable[name] = str(error)
    return unavailable


def write_header(out: Path, environment: dict[str, str]) -> None:
    """Begin the table. Raises `TrainingError` where it cannot be written."""
    _write(out, "w", [[*HEADER, *environment]])


def add_rows(out: Path, figures: Sequence[Figure], environment: dict[str, str]) -> None:
    """Add figures, and their machine, to the table. Raises as `write_header`."""
    date = datetime.now(UTC).date().isoformat()
    rows = []
    for figure in figures:
        cells = [*(f"{value:.6g}" for value in figure.percentiles), len(figure.values)]
        ratio = "" if figure.ratio is None else f"{figure.ratio:.4g}"
        place = (figure.bench, figure.case, figure.unit)
        rows.append([*place, *cells, ratio, figure.ratio_to, date, *environment.values()])
    _write(out, "a", rows)


def _write(out: Path, mode: str, rows: Sequence[Sequence[Any]]) -> None:
    try:
        with out.open(mode, encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        raise TrainingError(
            f"Cannot write the table to {out}: {error.strerror}; choose another place with --out."
        ) from error


@contextmanager
def _prepared(images: Path | None) -> Iterator[tuple[Path, Path]]:
    """The images as `convert` takes them, and the dataset made of them, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="fastbarlow-bench-") as temporary:
        if images is None:
            make_demo_images(Path(temporary) / "images", workers=CORES)
            images = Path(temporary) / "images" / "train"
        dataset = Path(temporary) / "images.beton"
        convert(images, dataset, workers=CORES)
        yield images, dataset


def _loader(load: Workload, images: Path, dataset: Path, progress: Progress | None) -> dict[str, Any]:
    choices = [name for name in LOADERS if name != "synthetic"]
    with process_group(load.device) as world:
        size = load.config.data.image_size
        setting = Setting(size, LOADER_PAIRS, CORES, world.device, AugmentConfig())
        return bench_loaders(
            dataset, choices, setting, repeats=load.repeats, seconds=LOADER_SECONDS, progress=progress
        )


def _augment(load: Workload, images: Path, dataset: Path, progress: Progress | None) -> dict[str, Any]:
    size = load.config.data.image_size
    with process_group(load.device) as world:
        return bench_augment(
            world.device, size=size, batch=LOADER_PAIRS, repeats=load.repeats, progress=progress
        )


def _convert(load: Workload, images: Path, dataset: Path, progress: Progress | None) -> dict[str, Any]:
    return bench_convert(
        images,
        max_sides=MAX_SIDES,
        num_images=CONVERTED_IMAGES,
        workers=CORES,
        repeats=load.repeats,
        progress=progress,
    )


def _loss(load: Workload, images: Path, dataset: Path, progress: Progress | None) -> dict[str, Any]:
    return bench_loss(
        load.loss_samples,
        load.config.model.projector_widths[-1],
        dtype=load.config.train.precision,
        repeats=load.repeats,
        device=load.device,
        progress=progress,
    )


def _step(load: Workload, images: Path, dataset: Path, progress: Progress | None) -> dict[str, Any]:
    return bench_step(load.config, repeats=load.repeats, progress=progress)


def _plan(load: Workload, images: Path, dataset: Path, progress: Progress | None) -> dict[str, Any]:
    config = load_config(DEMO_CONFIG, ["train.precision=fp32"])
    return bench_plan(config, ranks=PLAN_RANKS, steps=load.repeats, progress=progress)


def _knn(load: Workload, images: Path, dataset: Path, progress: Progress | None) -> dict[str, Any]:
    with process_group(load.device) as world:
        return bench_knn(
            KNN_ROWS, KNN_WIDTH, KNN_QUERIES, KNN_KS, world.device, repeats=load.repeats, progress=progress
        )


BENCHES = {
    "loader": _loader,
    "augment": _augment,
    "convert": _convert,
    "loss": _loss,
    "step": _step,
    "plan": _plan,
    "knn": _knn,
}
READ_IMAGES, NO_IMAGES = {"loader", "convert"}, (Path(), Path())
