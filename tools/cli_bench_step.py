"""`fastbarlow bench loss|step`: the loss, and the whole training step."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tools.console import progress_bar, say, show_json, show_table
from tools.options import Device, Json

STEP_CONFIG = Path(__file__).parents[1] / "configs" / "imagenet_rn50_1gpu.yaml"
StepSettings = Annotated[  # for `recipe_of_step`
    list[str] | None,
    typer.Argument(
        metavar="CONFIG KEY=VALUE",
        help="A YAML recipe, and settings that replace the recipe's. [configs/imagenet_rn50_1gpu.yaml]",
    ),
]


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


def step(
    settings: StepSettings = None,
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

    recipe, overrides = recipe_of_step(settings)
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


def recipe_of_step(settings: list[str] | None) -> tuple[Path, list[str]]:
    """The recipe, the first of `settings` unless that is an override, and the overrides."""
    recipe, overrides = STEP_CONFIG, list(settings or [])
    if overrides and "=" not in overrides[0]:
        recipe = Path(overrides.pop(0))
    return recipe, overrides


def _numbers(text: str | None) -> list[int]:
    """The batch sizes of "256,512"; raises `ConfigError`."""
    from train.errors import ConfigError

    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--batch must be numbers with commas between them, such as 256,512, not {text!r}.")
    return [int(part) for part in parts]
