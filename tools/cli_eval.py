"""`fastbarlow eval ...`: how good the features of a trained backbone are."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tools.eval_options import ImageOptions, OutputOptions, RankOptions, grouped
from tools.eval_protocol import run_protocol
from tools.options import Checkpoint

Train = Annotated[
    Path, typer.Argument(metavar="TRAIN", help="Labelled images: a .beton file or a class folder.")
]
Test = Annotated[Path, typer.Argument(metavar="TEST", help="Images to classify, of the same classes.")]

eval_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Measure how good the features of a trained backbone are.

    Options that are not given follow the eval section of the run's config, which its checkpoint holds. A
    .pth or .safetensors file holds none: there the built-in defaults count, which suit ImageNet.""",
)


@eval_app.command()
@grouped
def knn(
    checkpoint: Checkpoint,
    train: Train,
    test: Test,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k",
            help="Neighbours that vote; may be given several times, the first counts most; default: the "
            "run's own, or 200.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="t of the votes' weights exp(similarity / t); default: the run's own, or 0.07."),
    ] = None,
    *,
    images: ImageOptions,
    ranks: RankOptions,
    output: OutputOptions,
) -> None:
    """Classify TEST by the weighted votes of the nearest neighbours in TRAIN.

    Needs no training of its own. Prints the share of right answers. Its result is a JSON file, too. Under
    torchrun each process takes its share of the images, and --procs does not count.

    Examples

        fastbarlow eval knn runs/a/checkpoint.pt train.beton val.beton
        fastbarlow eval knn resnet50.pth imagenet/train imagenet/val --k 20 --k 200 --json
    """
    settings: dict[str, Any] = {"temperature": temperature}
    if k:
        settings |= {"k": k[0], "also_k": tuple(k[1:])}
    run_protocol("knn", checkpoint, train, test, {"knn": settings}, images, ranks, output)


@eval_app.command()
@grouped
def linear(
    checkpoint: Checkpoint,
    train: Train,
    test: Test,
    mode: Annotated[
        Literal["authors", "fast"],
        typer.Option(help="authors: as in the paper. fast: on features that are computed beforehand."),
    ] = "authors",
    passes: Annotated[
        int | None,
        typer.Option(
            help="fast: random crops of each image, 0 for its centre crop alone; default: the run's own, "
            "or 2."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over TRAIN; default: the run's own, or 100.")
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            help="First learning rate of the cosine; fast: may be given several times, to choose from; "
            "default: the run's own, or 0.3, or six from 0.01 to 3."
        ),
    ] = None,
    weight_decay: Annotated[
        list[float] | None,
        typer.Option(
            help="L2 penalty of the classifier; fast: may be given several times, to choose from; default: "
            "the run's own, or 1e-06, or 0, 1e-06 and 0.0001."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the classifier's weights, crops and order; default: the run's own, or 0."),
    ] = None,
    *,
    images: ImageOptions,
    ranks: RankOptions,
    output: OutputOptions,
) -> None:
    """Train a linear classifier on frozen features of TRAIN and test it on TEST.

    --mode authors is the paper's protocol (section 3.1), with the settings of the authors' code: SGD for 100
    epochs on new random crops and flips in each, batches of 256, a cosine from 0.3. top1 and top5 are those
    after the last epoch; best_top1 and best_top5 of the best epoch, chosen on TEST, are what the authors
    report.

    --mode fast computes the features of a few random crops of each image once, trains classifiers with all
    learning rates and weight decays at once, takes the best on a held-out tenth of TRAIN, and trains that one
    on all of TRAIN.

    An evaluation that was stopped goes on where it was; SIGTERM and SIGUSR1 end it with exit code 75. Its
    result is a JSON file, too. Under torchrun each process takes its share of every batch, and --procs does
    not count.

    Examples

        fastbarlow eval linear runs/a/checkpoint.pt train.beton val.beton
        fastbarlow eval linear resnet50.pth train.beton val.beton --mode fast --passes 4 --lr 0.1 --lr 1
        torchrun --nproc-per-node 8 --no-python fastbarlow eval linear resnet50.pth train.beton val.beton
    """
    from train.errors import ConfigError

    common = {"epochs": epochs, "seed": seed}
    if mode == "fast":
        grids = {
            "lr": tuple(lr) if lr else None,
            "weight_decay": tuple(weight_decay) if weight_decay else None,
        }
        options = {"linear_fast": common | grids | {"passes": passes}}
        run_protocol("linear-fast", checkpoint, train, test, options, images, ranks, output)
        return
    if passes is not None:
        raise ConfigError("--passes belongs to --mode fast; in the mode authors each epoch has new crops.")
    for name, given in (("--lr", lr), ("--weight-decay", weight_decay)):
        if given and len(given) > 1:
            raise ConfigError(f"{name} is given {len(given)} times, which is for --mode fast; give one.")
    single = {"lr": lr[0] if lr else None, "weight_decay": weight_decay[0] if weight_decay else None}
    run_protocol("linear", checkpoint, train, test, {"linear": common | single}, images, ranks, output)


@eval_app.command()
@grouped
def semisup(
    checkpoint: Checkpoint,
    train: Train,
    test: Test,
    percent: Annotated[
        float | None, typer.Option(help="Of TRAIN's images, as many of each class; drawn by the seed.")
    ] = None,
    subset: Annotated[
        Path | None,
        typer.Option(
            "--list", metavar="FILE.txt", help="Which images instead: a file name or sample number per line."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over these images; default: the run's own, or 20.")
    ] = None,
    lr_backbone: Annotated[
        float | None,
        typer.Option(help="First learning rate of the backbone; default: the run's own, or 0.005."),
    ] = None,
    lr_classifier: Annotated[
        float | None,
        typer.Option(help="First learning rate of the classifier; default: the run's own, or 0.5."),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="L2 penalty of both; default: the run's own, or 0.0.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of draw, classifier, crops and order; default: the run's own, or 0."),
    ] = None,
    *,
    images: ImageOptions,
    ranks: RankOptions,
    output: OutputOptions,
) -> None:
    """Fine-tune the backbone and a classifier on few labelled images of TRAIN and test them on TEST.

    The paper's protocol (section 3.2), with the settings of the authors' README, which they took for 1 % and
    10 %: SGD for 20 epochs on random crops and flips, batches of 256, no weight decay, a cosine. Batch-norm
    learns along, with the statistics of the whole batch on any number of processes. top1 and top5 are those
    after the last epoch; best_top1 and best_top5 of the best epoch, chosen on TEST, are what the authors
    report.

    SimCLR's lists 1percent.txt and 10percent.txt, which the paper uses, are read as they are; they name
    files, so TRAIN must then be the folder of images. The images that --percent draws are listed beside the
    result, so that others can take the same.

    An evaluation that was stopped goes on where it was; SIGTERM and SIGUSR1 end it with exit code 75. Its
    result is a JSON file, too. Under torchrun each process takes its share of every batch, and --procs does
    not count.

    Examples

        fastbarlow eval semisup runs/a/checkpoint.pt imagenet/train val.beton --list 1percent.txt
        fastbarlow eval semisup resnet50.pth train.beton val.beton --percent 10 --seed 1 --procs 8
    """
    from train.errors import ConfigError

    if (percent is None) == (subset is None):
        raise ConfigError("Give either --percent or --list: which images to learn from.")
    if percent is not None and not 0 < percent <= 100:
        raise ConfigError(f"--percent must be above 0 and at most 100, not {percent:g}.")
    settings = {
        "epochs": epochs,
        "lr_backbone": lr_backbone,
        "lr_classifier": lr_classifier,
        "weight_decay": weight_decay,
        "seed": seed,
    }
    which = {"percent": percent, "subset": subset}
    kind = f"semisup-{subset.stem if subset else f'{percent:g}'}"
    options = {"semisup": settings}
    run_protocol("semisup", checkpoint, train, test, options, images, ranks, output, kind, **which)
