"""`fastbarlow bench ...`: parts of the trainer, each in several ways side by side; or all of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tools.cli_bench_data import augment, convert, loader
from tools.cli_bench_step import StepSettings, loss, recipe_of_step, step
from tools.cli_plan import bench_plan
from tools.console import EXIT_USER_ERROR, leave, or_dash, progress_bar, say, show_json, show_table
from tools.options import Device, Json

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure one part of the trainer in all its variants, side by side on this machine.",
)
for command in (loader, augment, convert, loss, step):
    bench_app.command()(command)
bench_app.command(name="plan")(bench_plan)


@bench_app.command()
def knn(
    rows: Annotated[int, typer.Option(min=1, help="Features among which neighbours are sought.")] = 1_000_000,
    width: Annotated[int, typer.Option(min=1, help="Width of the features.")] = 2048,
    queries: Annotated[int, typer.Option(min=1, help="Features whose neighbours are sought.")] = 1000,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", min=1, help="Neighbours that vote; may be given several times. [20 and 200]"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns.")] = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How long kNN takes among a million features, and how much memory.

    The features are random. From 4 GiB on they lie in a temporary file in TMPDIR, mapped into memory, as
    those of `eval knn` do. Time and memory are those of the search alone.

    Examples

        fastbarlow bench knn
        fastbarlow bench knn --rows 1281167 --queries 50000 --device cuda --json
    """
    from tools.bench.knn import bench_knn
    from train.distributed import process_group

    with process_group(device) as world, progress_bar("searching") as progress:
        result = bench_knn(
            rows, width, queries, k or [20, 200], world.device, repeats=repeats, progress=progress
        )
    memory = "not told" if result["peak_memory_mb"] is None else f"{result['peak_memory_mb']:,.0f} MB"
    on_gpu = result["peak_gpu_memory_mb"]
    say(
        f"{queries:,} queries among {rows:,} x {width:,} features ({result['precision']}): "
        f"{result['seconds']:.1f} s, {result['tflop_per_second']:.2f} Tflop/s; memory beyond the features' "
        f"{result['features_mb']:,.0f} MB: {memory}"
        + ("" if on_gpu is None else f", on the GPU {on_gpu:,.0f} MB"),
        as_json=as_json,
    )
    if as_json:
        show_json(result)


@bench_app.command(name="all")
def bench_all(
    settings: StepSettings = None,
    out: Annotated[Path, typer.Option(metavar="FILE.csv", help="The table to write.")] = Path("results.csv"),
    images: Annotated[
        Path | None,
        typer.Option(metavar="SRC", help="Images, as `fastbarlow convert` takes them. [drawn ones]"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Run this benchmark; may be given several times."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns of everything.")] = 5,
    as_json: Json = False,
) -> None:
    """Run every benchmark on this machine and write one table.

    Each row has the 10th percentile, the median and the 90th over the turns, how often it was measured, how
    many times as fast as something else it is (the median of the turns' ratios), and the date, hardware and
    versions. The step is that of the recipe, and its image size and precision are used throughout; what each
    benchmark does is said by `fastbarlow bench NAME --help`. Photographs of the usual size give figures that
    tell of training; drawn images are small. Takes half an hour on two cores, and needs 3 GB of memory. A CPU
    without AVX-512 is slow in bf16: give train.precision=fp32 there.

    Examples

        fastbarlow bench all --images imagenet/val --out h200.csv
        fastbarlow bench all train.precision=fp32 --only loader --only loss --repeats 9
    """
    from tools.bench.all import Workload, add_rows, write_header
    from tools.bench.all import bench_all as run_all
    from tools.bench.figures import figures_of
    from tools.environment import describe_environment
    from train.config import load_config
    from train.distributed import process_group

    config = load_config(*recipe_of_step(settings))
    with process_group(config.train.device) as world:
        environment = describe_environment(world.device)
    write_header(out, environment)
    results: list[dict[str, Any]] = []

    def keep(result: dict[str, Any]) -> None:
        figures = figures_of(result)
        add_rows(out, figures, environment)
        results.append(result)
        rows = [("", "unit", "p10", "median", "p90", "times as fast")]
        for figure in figures:
            low, middle, high = (f"{value:.4g}" for value in figure.percentiles)
            ratio = or_dash(figure.ratio, ".2f") + (f" as {figure.ratio_to}" if figure.ratio_to else "")
            rows.append((figure.case, figure.unit, low, middle, high, ratio))
        show_table(f"{result['bench']}, {repeats} repeats", rows, as_json=as_json)

    with progress_bar("measuring") as progress:

        def announce(name: str) -> Any:
            say(f"measuring {name}", as_json=True)
            return progress

        load = Workload(config, repeats)
        unavailable = run_all(load, images, only or (), on_bench=announce, on_result=keep)
    for name, reason in unavailable.items():
        say(f"{name} was left out: {reason}", as_json=as_json)
    if not results:
        leave("No benchmark could be run.", EXIT_USER_ERROR)
    say(f"Written to {out}.", as_json=as_json)
    if as_json:
        show_json({"results": results, "unavailable": unavailable, "out": str(out)})
