"""`fastbarlow bench ...`: one part of the trainer, several ways, side by side."""

from typing import Annotated

import typer

from tools.console import progress_bar, say, show_json, show_table
from tools.options import ConfigPath, Device, Json, Overrides

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure one part of the trainer in all its variants, side by side on this machine.",
)


@bench_app.command()
def loader(
    config: ConfigPath,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="LOADER", help="Measure this loader; may be given several times."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each loader; the median counts.")] = 3,
    batches: Annotated[int, typer.Option(min=1, help="Measured batches in each turn.")] = 20,
    as_json: Json = False,
) -> None:
    """How many pairs of views per second each loader delivers from the recipe's dataset.

    Data set, image size, workers and batch size are the recipe's. Loaders that cannot read the data set are
    named with their reason. Writes no files.

    Examples

        fastbarlow bench loader configs/cifar10.yaml data.path=train.beton data.workers=8
        fastbarlow bench loader configs/cifar10.yaml --only ffcv --only dali --repeats 5 --json
    """
    from pipelines.loaders import LOADERS
    from tools.bench.loader import bench_loaders
    from train.config import load_config
    from train.distributed import process_group
    from train.errors import ConfigError

    run = load_config(config, overrides or [])
    names = only or [name for name in LOADERS if name != "synthetic"]
    unknown = next((name for name in names if name not in LOADERS), None)
    if unknown is not None:
        raise ConfigError(f"There is no loader {unknown!r}; choose from {', '.join(LOADERS)}.")
    with process_group(run.train.device) as world, progress_bar("measuring") as progress:
        result = bench_loaders(
            run, names, repeats=repeats, batches=batches, device=world.device, progress=progress
        )
    rows = [("loader", "pairs/s", "times the slowest")]
    for name, rate in result["median_pairs_per_second"].items():
        rows.append((name, f"{rate:.1f}", f"{result['ratio_to_slowest'][name]:.2f}"))
    show_table(f"{run.data.path}, {run.data.image_size} px, median of {repeats}", rows, as_json=as_json)
    for name, reason in result["unavailable"].items():
        say(f"{name}: {reason}", as_json=as_json)
    if as_json:
        show_json(result)


@bench_app.command()
def loss(
    samples: Annotated[int, typer.Option(min=2, help="Samples of the batch, N.")] = 256,
    width: Annotated[int, typer.Option(min=1, help="Width of the embeddings, D.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds; the median counts.")] = 5,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How long each algorithm of the loss takes, forward and backward, on random float32 embeddings.

    All algorithms give the same loss; "chosen" is the one that model.loss.algorithm=auto takes. Writes no
    files.

    Examples

        fastbarlow bench loss --samples 2048 --width 8192
        fastbarlow bench loss --samples 256 --width 8192 --repeats 9 --json
    """
    from tools.bench.loss import bench_loss
    from train.distributed import process_group

    with process_group(device) as world:
        result = bench_loss(samples, width, repeats, world.device)
    rows = [("algorithm", "ms")]
    rows += [(name, f"{1000 * seconds:.2f}") for name, seconds in result["median_seconds"].items()]
    show_table(f"N = {samples}, D = {width}, median of {repeats}", rows, as_json=as_json)
    ratio = result["dense_over_gram"]
    say(f"dense / gram = {ratio:.2f}; auto takes {result['chosen']}.", as_json=as_json)
    if as_json:
        show_json(result)
