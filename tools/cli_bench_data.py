"""`fastbarlow bench loader|augment|convert`: the data path, part by part."""

import os
from pathlib import Path
from typing import Annotated

import typer

from tools.console import or_dash, progress_bar, say, show_json, show_table
from tools.options import Device, Json

CORES = len(os.sched_getaffinity(0))


def loader(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A .beton file, or a folder with a sub-folder per class."),
    ],
    size: Annotated[int, typer.Option(min=8, max=512, help="Side of the views, in pixels.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Pairs of views in a batch.")] = 64,
    workers: Annotated[
        int, typer.Option(min=1, max=256, help="Threads or processes of each loader. [the cores at hand]")
    ] = CORES,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="LOADER", help="Measure this loader; may be given several times."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns of each; the median counts.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help="Length of a turn, at least.")] = 3.0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How many pairs of views per second each loader delivers, against the authors' data path.

    "crops" is what a loader delivers; "views" adds the distortions, computed on the device while the loader
    goes on. The authors' path is their transform in the worker processes of torch's DataLoader, which reads
    the same images as files: those of a .beton file are temporary. "floor" is libjpeg-turbo, which decodes
    each image once and does nothing else. "per core" is pairs for each second of one core; "MB" is the host's
    memory without the page cache. The stages are measured one by one, each with all cores to itself.

    Examples

        fastbarlow bench loader imagenet.beton
        fastbarlow bench loader imagenet/train --workers 8 --batch 256 --only dali --repeats 5 --json
    """
    from pipelines.config import AugmentConfig
    from pipelines.loaders import LOADERS
    from tools.bench.loader import bench_loaders
    from tools.bench.loader_measure import Setting
    from train.distributed import process_group
    from train.errors import ConfigError

    choices = [name for name in LOADERS if name != "synthetic"]
    unknown = next((name for name in only or [] if name not in choices), None)
    if unknown is not None:
        raise ConfigError(f"There is no loader {unknown!r}; choose from {', '.join(choices)}.")
    with process_group(device) as world, progress_bar("measuring") as progress:
        setting = Setting(size, batch, workers, world.device, AugmentConfig())
        result = bench_loaders(
            source, only or choices, setting, repeats=repeats, seconds=seconds, progress=progress
        )
    rows = [("loader", "pairs/s", "x authors'", "of floor", "cores", "per core", "MB")]
    rows += [
        (
            f"{row['loader']}, {row['delivers']}",
            f"{row['pairs_per_second']:.0f}",
            f"{row['ratio_to_authors']:.2f}",
            or_dash(row["share_of_decode_floor"], ".0%"),
            f"{row['cores_used']:.1f}",
            f"{row['pairs_per_core_second']:.0f}",
            or_dash(row["peak_memory_mb"], ".0f"),
        )
        for row in result["rows"]
    ]
    title = f"{source}, {size} px, batches of {batch}, {workers} workers, median of {repeats}"
    show_table(title, rows, as_json=as_json)
    if result["stages"]:
        rows = [("stage, alone", "on", "pairs/s", "cores", "per core")]
        rows += [
            (
                row["stage"],
                row["device"],
                f"{row['pairs_per_second']:.0f}",
                or_dash(row["cores_used"], ".1f"),
                or_dash(row["pairs_per_core_second"], ".0f"),
            )
            for row in result["stages"]
        ]
        show_table("The stages", rows, as_json=as_json)
    for name, reason in result["unavailable"].items():
        say(f"{name}: {reason}", as_json=as_json)
    say(result["limit"]["sentence"], as_json=as_json)
    if as_json:
        show_json(result)


def augment(
    size: Annotated[int, typer.Option(min=8, max=512, help="Side of the views, in pixels.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Pairs of views in a batch.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns of each; the median counts.")] = 5,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Crops of these images instead of drawn ones."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How fast each implementation distorts uint8 crops into normalised views, and the authors' PIL code.

    Ours run on as many threads as torch has, the authors' code in as many processes. On a GPU, torchvision's
    v2 transforms on each sample and Kornia on the batch are there to compare with. Rows on the CPU are timed
    by wall clock, drawing the random numbers included; rows on a GPU by its events, from the first kernel to
    the last, and ours have their numbers drawn ahead. Writes no files.

    Examples

        fastbarlow bench augment
        fastbarlow bench augment --size 96 --images imagenet/train --repeats 9 --json
    """
    from tools.bench.augment import bench_augment
    from train.distributed import process_group

    with process_group(device) as world, progress_bar("measuring") as progress:
        result = bench_augment(
            world.device, size=size, batch=batch, repeats=repeats, images=images, progress=progress
        )
    rows = [("implementation", "on", "dtype", "pairs/s", "us per view", "times the authors'")]
    rows += [
        (
            row["implementation"],
            row["device"],
            row["dtype"],
            f"{row['pairs_per_second']:.0f}",
            f"{row['us_per_view']:.4g}",
            f"{row['ratio_to_authors']:.2f}",
        )
        for row in result["rows"]
    ]
    show_table(f"{size} px, batches of {batch}, median of {repeats}", rows, as_json=as_json)
    if any(row["timed"] == "GPU events" for row in result["rows"]):
        say(
            "On the GPU, time is from the first kernel to the last; on the CPU, by wall clock.",
            as_json=as_json,
        )
    for name, reason in result["unavailable"].items():
        say(f"{name} {reason}.", as_json=as_json)
    if as_json:
        show_json(result)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="What `fastbarlow convert` takes.")],
    max_side: Annotated[
        list[int] | None,
        typer.Option(
            min=16, max=4096, help="Longer side, in pixels; may be given several times. [4096, 512, 256]"
        ),
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")] = 90,
    images: Annotated[int, typer.Option(min=1, help="The source's images are repeated up to here.")] = 2000,
    workers: Annotated[int, typer.Option(min=1, help="Our threads; FFCV's processes.")] = os.cpu_count() or 1,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each; the median counts.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="On the disk to measure; all is removed. [system's temporary]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """How fast images become a dataset, against FFCV's own writer and a plain copy of the same files.

    The files lie in the page cache. Ours and the copy count until the disk has everything; FFCV does not
    wait for it. "MB/s" counts the bytes of the source.

    Examples

        fastbarlow bench convert imagenet/val
        fastbarlow bench convert ILSVRC2012_img_val.tar --max-side 400 --workers 16 --json
    """
    from tools.bench.convert import bench_convert

    with progress_bar("measuring") as progress:
        result = bench_convert(
            source,
            max_sides=max_side or [4096, 512, 256],
            quality=quality,
            num_images=images,
            workers=workers,
            repeats=repeats,
            folder=folder,
            progress=progress,
        )
    rows = [("max side, writer", "copied", "images/s", "MB/s", "times FFCV", "times the copy")]
    rows += [
        (
            f"{row['max_side']} {row['writer']}",
            f"{row['images_copied'] / images:.0%}",
            f"{row['images_per_second']:.0f}",
            f"{row['mb_per_second']:.0f}",
            f"{row['ratio_to_ffcv']:.2f}",
            f"{row['ratio_to_copy']:.2f}",
        )
        for row in result["rows"]
    ]
    show_table(f"{images} images, {workers} workers, median of {repeats}", rows, as_json=as_json)
    if as_json:
        show_json(result)
