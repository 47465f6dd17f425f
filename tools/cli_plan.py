"""`fastbarlow plan` and `fastbarlow bench plan`."""

from pathlib import Path
from typing import Annotated

import typer

from tools.console import progress_bar, say, show_json, show_table
from tools.options import DEMO_CONFIG, ConfigPath, Json, Overrides


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="How many, over all machines.")] = 8,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="v100, a100, h100, h200, v100-16gb, ...; or cpu, for threads.")
    ] = "h100",
    link: Annotated[
        float | None,
        typer.Option(
            metavar="GB/s",
            help="What a machine can send to others, all its network cards together.",
            show_default="12.5 for each of its GPUs",
        ),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(metavar="N", help="GPUs of one machine.")] = 8,
    cores: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cores of the host for each GPU.", show_default="as many as needed"),
    ] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(metavar="profile.json", help="What was measured; several with different batch sizes."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict what a recipe would do on machines that you have not rented yet.

    Step time, pairs per second and hours of the whole recipe; memory of a GPU, and the setting that makes it
    fit; cores and storage that feed it; bytes by collective; and the same for 1 to 1,024 GPUs. Nothing is
    trained and no GPU is needed.

    Without a profile the speeds are published ones, and the prediction is rough: tools/plan/README.md says
    how far off. A profile.json of `fastbarlow profile`, of the same network on the same GPU, takes their
    place. Each figure is shown with its source.

    Examples

        fastbarlow plan configs/imagenet_rn50_32xv100.yaml --gpus 32 --gpu v100 --link 12.5
        fastbarlow plan configs/imagenet_rn50_8xh100.yaml --gpu h200 --profile profile.json
    """
    from tools.plan.cluster import make_cluster
    from tools.plan.plan import Planner
    from tools.plan.show import as_dict, headline, sentences, tables
    from train.config import load_config

    cluster = make_cluster(gpu, gpus, gpus_per_node, link)
    planner = Planner(load_config(config, overrides or []), cluster, cores=cores, profiles=profile or [])
    prediction, scale = planner.predict(), planner.scale()
    say(headline(prediction), as_json=as_json)
    for title, rows in tables(prediction, scale):
        show_table(title, rows, as_json=as_json)
    for sentence in sentences(planner, prediction, scale):
        say(sentence, as_json=as_json)
    if as_json:
        show_json(as_dict(planner, prediction, scale))


def bench_plan(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG KEY=VALUE",
            help="A YAML recipe, and settings that replace the recipe's. [configs/demo.yaml]",
        ),
    ] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Ranks; may be given several times. [1, 2]")] = None,
    pairs: Annotated[
        list[int] | None,
        typer.Option(help="Pairs of a rank to predict; may be given several times. [16, 32, 128]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each, after a warm-up.")] = 5,
    as_json: Json = False,
) -> None:
    """How good `fastbarlow plan` is: predicted and measured steps of ranks of one CPU thread each.

    Single ranks are profiled at 8 and 64 pairs, and the collectives by themselves; from this, steps of other
    sizes, with each loss, over all ranks, are predicted and then measured. No more ranks than cores.

    Examples

        fastbarlow bench plan configs/demo.yaml train.precision=fp32
    """
    from tools.bench.plan import MEASURED, bench_plan
    from train.config import load_config

    recipe, overrides = DEMO_CONFIG, list(settings or [])
    if overrides and "=" not in overrides[0]:
        recipe = Path(overrides.pop(0))
    with progress_bar("measuring") as progress:
        result = bench_plan(
            load_config(recipe, overrides),
            ranks=ranks or (1, 2),
            pairs=pairs or MEASURED,
            steps=steps,
            progress=progress,
        )
    rows = [("ranks, pairs of each, loss", "predicted ms", "measured ms", "predicted / measured")]
    rows += [
        (
            f"{row['ranks']}, {row['pairs_per_rank']}, {row['loss']}",
            f"{row['predicted_ms']:.1f}",
            f"{row['measured_ms']:.1f}",
            f"{row['ratio']:.2f}",
        )
        for row in result["rows"]
    ]
    show_table(f"One thread a rank, median of {steps} steps", rows, as_json=as_json)
    if as_json:
        show_json(result)
