"""`fastbarlow bench ...`: one part of the trainer, several ways, side by side."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from tools.console import progress_bar, say, show_json, show_table
from tools.options import Device, Json

CORES = len(os.sched_getaffinity(0))
STEP_CONFIG = Path(__file__).parents[1] / "configs" / "imagenet_rn50_1gpu.yaml"

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure one part of the trainer in all its variants, side by side on this machine.",
)


@bench_app.command()
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
            _or_dash(row["share_of_decode_floor"], ".0%"),
            f"{row['cores_used']:.1f}",
            f"{row['pairs_per_core_second']:.0f}",
            _or_dash(row["peak_memory_mb"], ".0f"),
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
                _or_dash(row["cores_used"], ".1f"),
                _or_dash(row["pairs_per_core_second"], ".0f"),
            )
            for row in result["stages"]
        ]
        show_table("The stages", rows, as_json=as_json)
    for name, reason in result["unavailable"].items():
        say(f"{name}: {reason}", as_json=as_json)
    say(result["limit"]["sentence"], as_json=as_json)
    if as_json:
        show_json(result)


@bench_app.command()
def loss(
    samples: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Samples of the global batch, N; may be given several times. [256, 2048]"),
    ] = None,
    width: Annotated[int, typer.Option(min=2, help="Width of the embeddings, D.")] = 8192,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="Precision of the embeddings.")
    ] = "fp32",
    algorithm: Annotated[
        list[str] | None,
        typer.Option(help="Measure this algorithm; may be given several times. [all of the plan]"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds; the median counts.")] = 5,
    procs: Annotated[
        int, typer.Option(min=1, help="Ranks on this machine: on GPUs if there is one for each.")
    ] = 1,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Also write the tables and versions there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """How the loss does against the authors' code: time, peak memory, precision, bytes sent.

    Forward and backward on random embeddings; all variants take turns. "/ products" is the time over that of
    the algorithm's matrix products alone, "error" the gradient's relative distance from the definition in
    float64. What the plan expects, by which model.loss.algorithm=auto chooses, stands beneath.

    Examples

        fastbarlow bench loss
        fastbarlow bench loss --samples 2048 --dtype bf16 --algorithm gram --repeats 9 --json
        fastbarlow bench loss --samples 256 --width 1024 --procs 4 --device cpu
    """
    from tools.bench.loss import bench_loss, choose_device
    from tools.bench.loss_table import check_place, loss_tables, write_page

    if out is not None:
        check_place(out)
    if device == "auto" and procs > 1 and choose_device(device, procs) == "cpu":
        say(f"{procs} ranks compute on the CPU, as there is not a GPU for each.", as_json=as_json)
    with progress_bar("measuring") as progress:
        result = bench_loss(
            samples or [256, 2048],
            width,
            dtype=dtype,
            algorithms=algorithm or [],
            repeats=repeats,
            device=device,
            processes=procs,
            progress=progress,
        )
    for title, rows in loss_tables(result):
        show_table(title, rows, as_json=as_json)
    if as_json:
        show_json(result)
    if out is not None:
        write_page(result, out)
        say(f"Written to {out}.", as_json=as_json)


@bench_app.command()
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


@bench_app.command()
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


@bench_app.command()
def step(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG KEY=VALUE",
            help="A YAML recipe, and settings that replace the recipe's. [configs/imagenet_rn50_1gpu.yaml]",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Pairs in a step. [256,512,1024; 16 on the CPU]"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a turn, after a warm-up. [20; 1 on the CPU]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns of each; the median counts.")] = 3,
    loader: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also with this loader at work. [the recipe's]")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="The dataset that it reads. [the recipe's]")
    ] = None,
    as_json: Json = False,
) -> None:
    """How fast a whole training step is, against the authors' code: pairs/s, TFLOP/s, MFU, memory, phases.

    Ours is as configured, from uint8 crops that lie ready on the device; the authors' starts from views that
    are distorted already, and has two separate passes, their loss and their LARS loop. One device, no
    dataset. With --loader or --data a further row has a real loader at work. "MFU" is the share of the GPU's
    published peak. train.batch_size is not read.

    Examples

        fastbarlow bench step
        fastbarlow bench step configs/cifar10_rn18.yaml model.norm=torch --batch 256 --json
        fastbarlow bench step --batch 512 --loader dali --data imagenet.beton
        fastbarlow bench step data.image_size=96 train.device=cpu
    """
    from tools.bench.step import bench_step
    from tools.bench.step_table import step_legend, step_tables
    from train.config import load_config

    recipe, overrides = STEP_CONFIG, list(settings or [])
    if overrides and "=" not in overrides[0]:
        recipe = Path(overrides.pop(0))
    config, live = load_config(recipe, overrides), None
    if loader is not None or data is not None:
        chosen = [f"data.{key}={value}" for key, value in (("loader", loader), ("path", data)) if value]
        live = load_config(recipe, overrides + chosen).data
    with progress_bar("measuring") as progress:
        result = bench_step(
            config, _numbers(batch), live=live, steps=steps, repeats=repeats, progress=progress
        )
    for title, rows in step_tables(result):
        show_table(title, rows, as_json=as_json)
    say(step_legend(result), as_json=as_json)
    for row in result["unavailable"]:
        say(f"{row['name']}, batch {row['batch_size']}: {row['reason']}.", as_json=as_json)
    if as_json:
        show_json(result)


def _numbers(text: str | None) -> list[int]:
    """The batch sizes of "256,512"; raises `ConfigError`."""
    from train.errors import ConfigError

    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--batch must be numbers with commas between them, such as 256,512, not {text!r}.")
    return [int(part) for part in parts]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
