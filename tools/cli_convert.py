"""`fastbarlow convert`, `verify`, `inspect`: datasets made, checked and looked at."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tools.console import EXIT_INTERRUPTED, EXIT_SHORTFALL, Progressor, leave, say, show_json
from tools.options import Json

if TYPE_CHECKING:
    from tools.convert.estimate import Estimate
    from tools.convert.inspect import Inspection
    from tools.convert.manifest import Manifest

DEFAULT_MAX_BAD = 0.001
BAR_WIDTH = 40  # characters of the histogram
_LINE_EVERY_S = 30  # where the progress does not go to a terminal

Dataset = Annotated[Path, typer.Argument(metavar="DST", help="A .beton file, or a folder of shards.")]


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a finite number.")
    return number


def add_commands(app: typer.Typer) -> None:
    """Make these the commands of `app`."""
    for command in (convert, verify, inspect):
        app.command()(command)


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A folder with one sub-folder of images per class, a folder of images without labels, a tar "
            "archive such as ImageNet's, a folder of tar shards, or a .txt list of such.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A .beton file, or a folder for tar shards.")],
    max_side: Annotated[
        int, typer.Option(min=16, max=4096, help="Shrink larger images to this longer side, in pixels.")
    ] = 512,
    quality: Annotated[
        int, typer.Option(min=1, max=100, help="JPEG quality of images that are encoded anew.")
    ] = 90,
    storage: Annotated[
        Literal["jpg", "raw", "mixed"],
        typer.Option(help="JPEG, raw pixels, or pixels where a JPEG saves less than --raw-factor."),
    ] = "jpg",
    raw_factor: Annotated[
        float,
        typer.Option(
            min=1,
            callback=_finite,
            help="With mixed: raw where pixels take at most this many times the JPEG.",
        ),
    ] = 2.0,
    check: Annotated[
        Literal["structure", "decode"],
        typer.Option(help="What a JPEG must pass to be copied: its structure is whole, or it decodes."),
    ] = "structure",
    shards: Annotated[
        int | None, typer.Option(min=1, help="Number of tar shards; default one per 1,000 images.")
    ] = None,
    subset: Annotated[
        Path | None, typer.Option(metavar="LIST", help="Take only the files named there, one on a line.")
    ] = None,
    ground_truth: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labels of images without: ImageNet's development kit, or a list."),
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Take all images at any depth, without labels.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = os.cpu_count() or 1,
    resume: Annotated[
        bool, typer.Option(help="Go on with what an interrupted conversion to DST has left.")
    ] = True,
    max_bad: Annotated[
        float,
        typer.Option(
            min=0, max=1, callback=_finite, help="Share of bad images above which the exit code is 1."
        ),
    ] = DEFAULT_MAX_BAD,
    as_json: Json = False,
) -> None:
    """Convert images to a dataset that the fast loaders read.

    JPEGs that fit are copied as they are; all else is decoded, shrunk if it is too large, and encoded once.
    Samples keep the source's order. Images that cannot be read are left out, counted at the end and named in
    the manifest with the reason; above --max-bad the exit code is 1, and the dataset is there all the same.

    A DST ending in .beton becomes one file, which FFCV opens with the fields image (RGBImageField) and label
    (IntField), and x.manifest.json beside it. Any other DST becomes a folder of WebDataset tar shards with
    DALI's index files, and manifest.json among them.

    DST appears only when it is complete; until then the work is in hidden files beside it. After Ctrl-C, a
    kill or a full disk the same command goes on where it stopped; the result is the same to the last byte.

    Examples

        fastbarlow convert imagenet/train train.beton
        fastbarlow convert ILSVRC2012_img_train.tar train.beton --workers 32
        fastbarlow convert ILSVRC2012_img_val.tar val.beton --ground-truth ILSVRC2012_devkit_t12.tar.gz
        fastbarlow convert imagenet/train shards/train --shards 1024 --max-side 400
    """
    from tools.convert import convert as convert_images
    from tools.convert.interrupt import single_interrupt
    from tools.convert.manifest import ConvertSettings, manifest_path

    settings = ConvertSettings(
        max_side=max_side, quality=quality, storage=storage, raw_factor=raw_factor, check=check
    )
    with single_interrupt():
        try:
            with _progress("images") as progress:
                manifest = convert_images(
                    source,
                    target,
                    settings=settings,
                    shards=shards,
                    subset=subset,
                    ground_truth=ground_truth,
                    unlabelled=unlabelled,
                    workers=workers,
                    resume=resume,
                    on_estimate=lambda known: _show_estimate(known, as_json=as_json),
                    progress=progress,
                )
        except KeyboardInterrupt:
            leave("Interrupted; the same command goes on where it stopped.", EXIT_INTERRUPTED)
    _show_result(manifest, target, as_json=as_json)
    if as_json:
        summary = manifest.model_dump(mode="json", exclude={"files", "classes", "images_per_class"})
        show_json({"manifest": str(manifest_path(target)), **summary})
    if manifest.share_left_out > max_bad:
        leave(
            f"{manifest.share_left_out:.2%} of the images are bad, more than --max-bad {max_bad:g}; "
            f"see left_out in {manifest_path(target)}.",
            EXIT_SHORTFALL,
        )


def verify(
    dataset: Dataset,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = os.cpu_count() or 1,
    as_json: Json = False,
) -> None:
    """Read a dataset again and compare every byte with its manifest's checksums.

    Ends with exit code 2 and one sentence on the first damage, which names the samples in it.

    Examples

        fastbarlow verify train.beton
        fastbarlow verify shards/train --workers 16
    """
    from rich.filesize import decimal

    from tools.convert.verify import verify as verify_dataset

    started = time.monotonic()
    with _progress("bytes") as progress:
        manifest = verify_dataset(dataset, workers=workers, progress=progress)
    seconds, size = time.monotonic() - started, sum(file.bytes for file in manifest.files)
    say(
        f"{dataset}: all {manifest.images} images are as they were written "
        f"({decimal(size)} in {seconds:.1f} s).",
        as_json=as_json,
    )
    if as_json:
        show_json({"images": manifest.images, "bytes": size, "seconds": seconds, "sha256": manifest.sha256})


def inspect(dataset: Dataset, as_json: Json = False) -> None:
    """Show what is in a dataset: counts, sizes, storage, classes, resolutions, where it comes from.

    Also looks into .beton files that FFCV has written.

    Examples

        fastbarlow inspect train.beton
        fastbarlow inspect shards/train --json
    """
    from tools.convert.inspect import inspect as inspect_dataset

    found = inspect_dataset(dataset)
    _show_inspection(found, as_json=as_json)
    if as_json:
        show_json(found.model_dump(mode="json"))


def _show_estimate(known: "Estimate", *, as_json: bool) -> None:
    from rich.filesize import decimal

    text = f"{known.entries} files"
    if known.done:
        text = f"Going on after {known.done} of {known.entries} files"
    if known.seconds is not None:
        text += f"; about {timedelta(seconds=round(known.seconds))} for {decimal(known.bytes)} to write"
    say(f"{text}; {decimal(known.free_bytes)} free.", as_json=as_json)


def _show_result(manifest: "Manifest", target: Path, *, as_json: bool) -> None:
    from rich.filesize import decimal

    from tools.convert.manifest import manifest_path

    size = sum(file.bytes for file in manifest.files)
    labels = "without labels" if manifest.unlabelled else f"of {len(manifest.classes)} classes"
    say(f"{target}: {manifest.images} images {labels}, {decimal(size)}.", as_json=as_json)
    anew = manifest.images - manifest.images_copied
    seconds = manifest.seconds
    rate = f", {manifest.images / seconds:,.0f} images/s" if seconds else ""
    say(
        f"Copied as they are: {manifest.images_copied}; encoded anew: {anew}; {seconds:.1f} s{rate}.",
        as_json=as_json,
    )
    if manifest.left_out:
        say(
            f"Left out as unreadable: {len(manifest.left_out)}; see {manifest_path(target)}.", as_json=as_json
        )
    if manifest.ignored:
        say(f"Not looked at, as their names are not those of images: {manifest.ignored}.", as_json=as_json)


def _show_inspection(found: "Inspection", *, as_json: bool) -> None:
    from rich.filesize import decimal

    stored = [(found.images_jpg, "JPEG"), (found.images_raw, "raw pixels")]
    sizes, counts = found.sizes, list(found.images_per_class.values())
    rows = {
        "format": f"{found.format}; files: {found.files}, {decimal(found.bytes)}",
        "images": f"{found.images}, {decimal(found.image_bytes)}",
        "storage": ", ".join(f"{count} {name}" for count, name in stored if count),
        "height": f"{sizes.min_height} to {sizes.max_height} px, mean {sizes.mean_height:.0f}",
        "width": f"{sizes.min_width} to {sizes.max_width} px, mean {sizes.mean_width:.0f}",
        "classes": "none; the images have no labels",
    }
    if not found.unlabelled:
        rows["classes"] = f"{len(counts)}, with {min(counts)} to {max(counts)} images"
    if found.provenance:
        origin = found.provenance
        rows |= {
            "source": f"{origin.source} ({origin.source_kind})",
            "made": f"{origin.created:%Y-%m-%d %H:%M} UTC by fastbarlow {origin.versions['fastbarlow']}",
            "settings": ", ".join(f"{key} {value}" for key, value in origin.settings),
            "copied as is": str(origin.images_copied),
            "left out": str(origin.left_out),
            "sha256": origin.sha256,
        }
    for name, value in rows.items():
        say(f"{name:<14}{value}", as_json=as_json)
    say("longer side, px", as_json=as_json)
    most = max(sizes.longer_side.values())
    for high, count in sizes.longer_side.items():
        bar = "#" * -(-count * BAR_WIDTH // most)
        say(f"  to {high:<6} {count:>9} {bar}", as_json=as_json)


@contextmanager
def _progress(unit: str) -> Iterator[Progressor]:
    """Shows amount, rate and time left on standard error: a bar on a terminal, else now and then a line."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console, describe = Console(stderr=True), _Rate(unit)
    if not console.is_terminal:
        last = time.monotonic()

        def show_line(done: int, total: int) -> None:
            nonlocal last
            text = describe(done, total)
            if time.monotonic() - last >= _LINE_EVERY_S:
                last = time.monotonic()
                print(text, file=sys.stderr, flush=True)

        yield show_line
        return
    columns = BarColumn(bar_width=24), TextColumn("{task.description}", table_column=Column())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("listing", total=None)
        yield lambda done, total: progress.update(
            task, completed=done, total=total, description=describe(done, total)
        )


class _Rate:
    """Amount, rate and time left as text; what was done before the first call does not count as fast."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> str:
        now = time.monotonic()
        start, before = self._first = self._first or (now, done)
        rate = (done - before) / max(now - start, 1e-9)
        left = timedelta(seconds=round((total - done) / rate)) if rate else "unknown time"
        return f"{self._amount(done)}/{self._amount(total)} {self._amount(rate)}/s  {left} left"

    def _amount(self, number: float) -> str:
        from rich.filesize import decimal

        return decimal(int(number)) if self._unit == "bytes" else f"{number:,.0f}"
