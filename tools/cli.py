"""The command `fastbarlow`. Each command reads its arguments, calls the library and prints the result.

Heavy libraries are imported inside the commands, so that `--help` is quick.
"""

from pathlib import Path
from typing import Annotated

import typer

from tools.cli_audit import audit, report
from tools.cli_bench import bench_app
from tools.cli_convert import add_commands as add_convert_commands
from tools.cli_detect import detect
from tools.cli_eval import eval_app
from tools.cli_export import export
from tools.cli_plan import plan
from tools.cli_pretrain import pretrain
from tools.cli_profile import profile
from tools.cli_transfer import transfer, voc07
from tools.console import (
    EXIT_SHORTFALL,
    Commands,
    leave,
    say,
    show_json,
    show_table,
    training_progress,
)
from tools.options import DEMO_CONFIG, Json

REQUIRED_GAIN_POINTS = 15  # of kNN accuracy by DEMO_CONFIG, which gains 27 where it was measured

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""Train Barlow Twins as fast as the hardware allows, and see where the time goes.

    The usual way: convert images to a dataset, pretrain a twin on it,
    evaluate and export its backbone; profile says what limits the speed.
    demo does all of it in a few minutes on drawn images.

    Exit codes of all commands: 0 done; 2 something in the input is wrong, said in one sentence on standard
    error; 75 stopped by SIGTERM or SIGUSR1 with the last step saved, so that a scheduler may start the same
    command again; 130 interrupted by Ctrl-C. demo ends with 1 where the training has not worked, convert
    where too many images are bad.""",
)
add_convert_commands(app)
for command in (report, detect, transfer, voc07):
    eval_app.command()(command)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, run and report.")] = Path("demo"),
    config: Annotated[
        Path,
        typer.Option(
            help="Recipe of the small run; its paths are not used.",
            show_default="configs/demo.yaml of the checkout",
        ),
    ] = DEMO_CONFIG,
    as_json: Json = False,
) -> None:
    """Run everything once, small, on this machine, and write a report to look at.

    Draws a data set of JPEG images, converts it, pretrains a small twin, evaluates it against the same
    network untrained, profiles it. Takes a few minutes on two CPU cores. The images are kept for a second
    call; the run is made anew.

    Writes into OUT: images/, train.beton and val.beton with manifests, run/ with untrained.pt, checkpoint.pt,
    metrics.jsonl and profile/, and report.html, one file with no links to the outside.

    Ends with exit code 1 where the default recipe gains fewer than 15 points of kNN accuracy.

    Example

        fastbarlow demo --out demo
    """
    from tools.demo import run_demo

    with training_progress() as on_step:
        result = run_demo(
            out,
            config,
            on_phase=lambda phase: say(phase, as_json=True),
            on_step=on_step,
            required_gain_points=REQUIRED_GAIN_POINTS if config == DEMO_CONFIG else None,
        )
    accuracies = result["accuracies"]
    rows = [("features", "kNN", "linear")]
    rows += [(name, f"{of['kNN']:.1%}", f"{of['linear']:.1%}") for name, of in accuracies.items()]
    show_table("Accuracy on held-out images", rows, as_json=as_json)
    rows = [("phase", "seconds"), *((name, f"{seconds:.1f}") for name, seconds in result["seconds"].items())]
    show_table("Time", rows, as_json=as_json)
    say(
        f"kNN accuracy {accuracies['untrained network']['kNN']:.1%} untrained, "
        f"{accuracies['trained network']['kNN']:.1%} trained: {result['gain_points']:+.1f} points.",
        as_json=as_json,
    )
    say(f"Look at {result['report']}", as_json=as_json)
    if as_json:
        show_json(result)
    if result["shortfall"]:
        leave(result["shortfall"], EXIT_SHORTFALL)


app.command()(pretrain)
app.command()(audit)
app.command()(profile)
app.command()(plan)


@app.command()
def show_views(
    dataset: Annotated[
        Path,
        typer.Argument(metavar="DATASET", help="A .beton file, or a folder with one sub-folder per class."),
    ],
    out: Annotated[Path, typer.Option(help="The .png file to write.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Recipe with the distortions, loader and image size.",
            show_default="the paper's distortions, loader folder",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=64, help="How many, a row of the picture each.")] = 8,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Default the recipe's, or 0.")
    ] = None,
    epoch: Annotated[int, typer.Option(min=0, help="Each epoch draws anew.")] = 0,
    size: Annotated[
        int | None, typer.Option(min=8, max=512, help="Pixels; default the recipe's, or 224.")
    ] = None,
) -> None:
    """Draw a picture of images, their two distorted views and the numbers drawn for them.

    They are the first images of that epoch of training, with the very crops and colours that the trainer sees
    on this dataset with that recipe and seed. Needs no GPU.

    Examples

        fastbarlow show-views train.beton --out views.png
        fastbarlow show-views train.beton --out views.png --config configs/cifar10_rn18.yaml --epoch 7
    """
    from tools.show_views import show_views as write_picture

    shown = write_picture(dataset, out, config, num_images=images, seed=seed, epoch=epoch, size=size)
    say(f"{out}: {shown} images with their views.")


app.command()(export)


def main() -> None:
    """Entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
