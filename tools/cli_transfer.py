"""`fastbarlow eval transfer` and `eval voc07`: other data sets."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tools.console import say, show_table
from tools.eval_options import ImageOptions, OutputOptions, RankOptions, grouped
from tools.eval_protocol import run_protocol
from tools.options import Checkpoint


@grouped
def transfer(
    name: Annotated[
        Literal["places205", "inat18", "folder"],
        typer.Argument(metavar="NAME", help="places205, inat18, or folder: any other in class folders."),
    ],
    checkpoint: Checkpoint,
    root: Annotated[
        Path,
        typer.Argument(metavar="ROOT", help="Where the data set was unpacked; of folder: train/ and val/."),
    ],
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes; default: the run's own, or 14 of places205, 84 of inat18, 28 of others."),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate at first; default: the run's own, or 0.01.")
    ] = None,
    milestone: Annotated[
        list[int] | None,
        typer.Option(
            help="Epoch after which the rate is divided by ten; may be given several times; default: the "
            "run's own, or at a third and two thirds of the epochs."
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="L2 penalty of the linear layer; default: the run's own, or 0.0005."),
    ] = None,
    normalise: Annotated[
        bool | None,
        typer.Option(
            "--batch-norm/--no-batch-norm",
            help="Batch-norm before the linear layer; default: the run's own, or with it.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the layer's weights, crops and order; default: the run's own, or 0."),
    ] = None,
    *,
    images: ImageOptions,
    ranks: RankOptions,
    output: OutputOptions,
) -> None:
    """Train a linear classifier on the frozen features of another data set, with the paper's settings.

    ROOT is laid out as the data set's archives unpack: of places205, trainvalsplit_places205/ and
    data/vision/torralba/deeplearning/images256/; of inat18, train2018.json, val2018.json and train_val2018/.
    Learns from the training images and classifies those for validation.

    The rate is divided by ten twice, as the paper says; VISSL, which the paper used, has published three
    times: --milestone 4 --milestone 8 --milestone 12 for places205, 24, 48 and 72 for inat18. Random crops,
    figures, stops and processes are as those of `eval linear`.

    Examples

        fastbarlow eval transfer places205 runs/a/checkpoint.pt /data/places205
        fastbarlow eval transfer folder resnet50.pth /data/flowers --epochs 50 --json
    """
    from eval.transfer import parts_of

    options = {
        "epochs": epochs,
        "lr": lr,
        "milestones": tuple(milestone) if milestone else None,
        "weight_decay": weight_decay,
        "normalise": normalise,
        "seed": seed,
    }
    train, test = parts_of(name, root)
    protocol = f"transfer-{name}"
    run_protocol(protocol, checkpoint, train, test, {"transfer": options}, images, ranks, output, place=root)


@grouped
def voc07(
    checkpoint: Checkpoint,
    devkit: Annotated[
        Path, typer.Argument(metavar="VOCDEVKIT", help="Folder that holds VOC2007, as the archives unpack.")
    ],
    grid: Annotated[
        int | None,
        typer.Option(
            help="Side of the grid to which the last map is averaged, 1 for its mean; default: the run's "
            "own, or 2."
        ),
    ] = None,
    cost: Annotated[
        list[float] | None,
        typer.Option(
            help="Cost to choose from; may be given several times; default: the run's own, or eleven from "
            "0.01 to 1000."
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(help="Parts of trainval to choose the cost on; default: the run's own, or 3."),
    ] = None,
    *,
    images: ImageOptions,
    ranks: RankOptions,
    output: OutputOptions,
) -> None:
    """Classify PASCAL VOC 2007 with linear SVMs on frozen features: train on trainval, test on test.

    The paper's protocol, with the settings of VISSL, whose authors are its source: images squashed to a
    square, the last stage's map averaged to 2 x 2 places (8192 features of a ResNet-50), length 1; one
    machine for each of the 20 classes, its cost picked by cross-validation on trainval. Objects marked as
    difficult count neither for nor against. The machines are fitted on --workers processes, of up to 1.5 GB
    each, or as many as there are cores.

    mAP is the mean of the interpolated average precision, which VISSL reports; mAP_11_point is the measure of
    the challenge in 2007. The result, a JSON file too, has the figures of each class. Stops and processes are
    as those of `eval linear`.

    Examples

        fastbarlow eval voc07 runs/a/checkpoint.pt VOCdevkit
        fastbarlow eval voc07 resnet50.pth VOCdevkit --grid 1 --workers 4 --json
    """
    from eval.transfer import parts_of
    from pipelines.source.voc import YEAR

    options = {"voc07": {"grid": grid, "costs": tuple(cost) if cost else None, "folds": folds}}
    train, test = parts_of("voc07", devkit)
    record = run_protocol("voc07", checkpoint, train, test, options, images, ranks, output, place=Path(YEAR))
    if record is None:
        return
    rows = [("class", "AP", "11 points", "cost")]
    rows += [
        (name, f"{of['average_precision']:.2%}", f"{of['eleven_point']:.2%}", f"{of['cost']:g}")
        for name, of in record["classes"].items()
    ]
    show_table("Classes", rows, as_json=output.as_json)
    unconverged = sum(of["unconverged"] for of in record["classes"].values())
    if unconverged:
        say(
            f"{unconverged} fits stopped at the limit of iterations, which VISSL has too.",
            as_json=output.as_json,
        )
