"""`fastbarlow bench convert`: our conversion, FFCV's own writer and a plain copy, side by side."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipelines.errors import DataError
from tools.convert import convert
from tools.convert.images import BadImage, prepare
from tools.convert.manifest import ConvertSettings
from tools.convert.sources import open_image_set
from tools.environment import describe_environment

FFCV_PROGRAM = Path(__file__).with_name("convert_ffcv.py")


@dataclass(frozen=True)
class _Bench:
    folder: Path  # for all files
    tree: Path  # the images, as an image folder
    quality: int
    workers: int

    @contextmanager
    def target(self) -> Iterator[Path]:
        """A dataset's name, with the disk at rest; afterwards it is removed."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            os.sync()  # what the last writer has left, and the removal of its file
            yield Path(folder) / "x.beton"

    def ours(self, max_side: int) -> tuple[float, int]:
        """Seconds, to the dataset under its name on the disk, and how many images were copied."""
        settings = ConvertSettings(max_side=max_side, quality=self.quality)
        with self.target() as target:
            start = time.perf_counter()
            manifest = convert(self.tree, target, settings=settings, workers=self.workers)
            return time.perf_counter() - start, manifest.images_copied

    def ffcv(self, max_side: int) -> float:
        """Seconds of FFCV's writer, which does not wait for the disk."""
        with self.target() as target:
            arguments = (self.tree, target, max_side, self.quality, self.workers)
            command = [sys.executable, str(FFCV_PROGRAM), *map(str, arguments)]
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise DataError(f"FFCV's writer failed ({lines[-1]}); use fewer workers or other images.")
        return float(result.stdout)

    def copy(self) -> float:
        """Seconds to copy the files' bytes into one file, to the disk, in the order of their names."""
        with self.target() as target:
            start = time.perf_counter()
            with target.open("wb", buffering=0) as out:
                for file in sorted(self.tree.glob("*/*")):
                    out.write(file.read_bytes())
                os.fsync(out.fileno())
            return time.perf_counter() - start


def bench_convert(
    source: Path,
    *,
    max_sides: Sequence[int],
    quality: int = 90,
    num_images: int = 2000,
    workers: int,
    repeats: int = 3,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Images/s and MB/s of source files for each of `max_sides`.

    All read the same files, from the same folder and the page cache: those of `source` (what `open_image_set`
    takes), again and again up to `num_images`, written into `folder` (default: the system's temporary one).
    They take turns, so that a slow moment of the machine hits all of them; a ratio is the median of the
    turns' ratios. FFCV's writer gets as many processes as our conversion gets threads. Everything is
    removed at the end. Raises `DataError` for a source without good images and a folder that cannot be
    written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="fastbarlow-bench-") as temporary:
            bench = _Bench(Path(temporary), Path(temporary) / "images", quality, workers)
            num_bytes = _write_tree(source, bench.tree, num_images)
            rows = _measure(bench, max_sides, repeats, num_images, num_bytes, progress or (lambda *_: None))
    except OSError as error:
        raise DataError(
            f"The images cannot be written ({error.strerror}: {error.filename}); choose another --folder."
        ) from error
    return {
        "bench": "convert",
        "source": str(source),
        "images": num_images,
        "bytes": num_bytes,
        "quality": quality,
        "workers": workers,
        "repeats": repeats,
        "rows": rows,
        "environment": describe_environment(torch.device("cpu")),
    }


def _measure(
    bench: _Bench,
    max_sides: Sequence[int],
    repeats: int,
    num_images: int,
    num_bytes: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    bench.ours(max_sides[0])  # what is loaded only once is not measured
    seconds: dict[int, dict[str, list[float]]] = {
        side: {"fastbarlow": [], "ffcv": [], "copy": []} for side in max_sides
    }
    copied = {}
    for turn in range(repeats):
        for place, side in enumerate(max_sides):
            ours, copied[side] = bench.ours(side)
            for name, value in (("fastbarlow", ours), ("ffcv", bench.ffcv(side)), ("copy", bench.copy())):
                seconds[side][name].append(value)
            progress(turn * len(max_sides) + place + 1, repeats * len(max_sides))
    rows = []
    for side, by_name in seconds.items():
        for name, values in by_name.items():
            rows.append(
                {
                    "max_side": side,
                    "writer": name,
                    "images_copied": {"fastbarlow": copied[side], "ffcv": 0, "copy": num_images}[name],
                    "images_per_second": num_images / median(values),
                    "mb_per_second": num_bytes / median(values) / 1e6,
                    "ratio_to_ffcv": _ratio(by_name["ffcv"], values),
                    "ratio_to_copy": _ratio(by_name["copy"], values),
                    "all_seconds": values,
                }
            )
    return rows


def _ratio(others: list[float], values: list[float]) -> float:
    return median(other / value for other, value in zip(others, values, strict=True))


def _write_tree(source: Path, tree: Path, num_images: int) -> int:
    """Write the good images of `source` as an image folder, until there are `num_images`; returns bytes."""
    images = open_image_set(source)
    num_bytes = written = index = 0
    while written < num_images:
        if index == len(images) and not written:
            raise DataError(f"{source} holds no image that can be converted; give other images.")
        place = index % len(images)
        index += 1
        data = images.read(place)
        try:
            prepare(data, ConvertSettings())
        except BadImage:
            continue
        file = tree / f"{images.label(place) + 1:06}" / f"{written:08}{Path(images.name(place)).suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        num_bytes += len(data)
        written += 1
    return num_bytes
