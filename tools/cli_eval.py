"""`fastbarlow eval ...`: how good the frozen features of a backbone are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tools.console import progress_bar, say, show_json, show_result
from tools.options import Checkpoint, Device, Json, ResultFile

if TYPE_CHECKING:
    from eval.config import EvalConfig
    from model.weights import BackboneWeights

Train = Annotated[
    Path, typer.Argument(metavar="TRAIN", help="Labelled images: a .beton file or a class folder.")
]
Test = Annotated[Path, typer.Argument(metavar="TEST", help="Images to classify, of the same classes.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Side of the centre crop, in pixels; default: the run's own, or 224.")
]
Resize = Annotated[
    int | None, typer.Option(help="Short side before the crop, in pixels; default: the run's own, or 256.")
]
BatchSize = Annotated[
    int | None, typer.Option(help="Images in one pass of the backbone; default: the run's own, or 256.")
]
Workers = Annotated[int | None, typer.Option(help="Decoding processes; default: the run's own, or 8.")]

Options = dict[str, dict[str, Any]]  # by section and key of EvalConfig; None where not given

eval_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Measure how good the frozen features of a trained backbone are.

    Options that are not given follow the eval section of the run's config, which its checkpoint holds. A
    .pth or .safetensors file holds none: there the built-in defaults count, which suit ImageNet.""",
)


@eval_app.command()
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
    image_size: ImageSize = None,
    resize: Resize = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = "auto",
    out: ResultFile = None,
    as_json: Json = False,
) -> None:
    """Classify TEST by the weighted votes of the nearest neighbours in TRAIN.

    Needs no training of its own. Prints the share of right answers. Its result is a JSON file, too.

    Examples

        fastbarlow eval knn runs/a/checkpoint.pt train.beton val.beton
        fastbarlow eval knn resnet50.pth imagenet/train imagenet/val --k 20 --k 200 --json
    """
    features = {"image_size": image_size, "resize": resize, "batch_size": batch_size, "workers": workers}
    options = {"features": features, "knn": {"temperature": temperature}}
    if k:
        options["knn"] |= {"k": k[0], "also_k": tuple(k[1:])}
    _evaluate("knn", checkpoint, train, test, options, device, out, as_json)


@eval_app.command()
def linear(
    checkpoint: Checkpoint,
    train: Train,
    test: Test,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training features; default: the run's own, or 100.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="First learning rate of the cosine; default: the run's own, or 0.3.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="L2 penalty of the classifier; default: the run's own, or 1e-06.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the classifier's weights and the order; default: the run's own, or 0."),
    ] = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = "auto",
    out: ResultFile = None,
    as_json: Json = False,
) -> None:
    """Train a linear classifier on the features of TRAIN and test it on TEST.

    Features are computed once, without augmentation, so the figure is a little below that of a probe that
    augments. Prints the shares of right answers, first guess and among five. Its result is a JSON file, too.

    Examples

        fastbarlow eval linear runs/a/checkpoint.pt train.beton val.beton
        fastbarlow eval linear resnet50.pth train.beton val.beton --epochs 50 --lr 1.0 --json
    """
    features = {"image_size": image_size, "resize": resize, "batch_size": batch_size, "workers": workers}
    probe = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay, "seed": seed}
    options = {"features": features, "linear": probe}
    _evaluate("linear", checkpoint, train, test, options, device, out, as_json)


def _evaluate(
    protocol: str,
    checkpoint: Path,
    train: Path,
    test: Path,
    options: Options,
    device: str,
    out: Path | None,
    as_json: bool,
) -> None:
    from eval.run import evaluate
    from model.weights import read_weights
    from pipelines.source import open_source
    from tools.results import default_place, result_record, write_record
    from train.distributed import process_group

    weights = read_weights(checkpoint)
    config = eval_settings(weights, checkpoint, options)
    sources = open_source(train), open_source(test)
    with process_group(device) as world, progress_bar("extracting features") as progress:
        result = evaluate(
            protocol,
            weights.build(),
            *sources,
            config,
            world.device,
            progress,
            normalisation=weights.normalisation,
        )
        record = result_record(result, checkpoint, world.device)
    out = out or default_place(checkpoint, protocol, test)
    write_record(record, out)
    features, trained_on, tested_on = config.features, result.data["train"], result.data["test"]
    show_result(result, as_json=as_json)
    say(
        f"{trained_on.images:,} labelled images, {tested_on.images:,} to classify, "
        f"{tested_on.classes} classes; short side {features.resize} px, centre crop "
        f"{features.image_size} px. Written to {out}.",
        as_json=as_json,
    )
    if as_json:
        show_json(record)


def eval_settings(weights: "BackboneWeights", checkpoint: Path, options: Options) -> "EvalConfig":
    """The run's own eval settings, or the defaults, with the options that were given in their place."""
    remedy = "export the backbone and evaluate the exported file"
    settings = _validated(weights.eval_settings or {}, f"{checkpoint}: ", remedy).model_dump()
    for section, given in options.items():
        settings[section] |= {name: value for name, value in given.items() if value is not None}
    return _validated(settings, "", "change the option")


def _validated(settings: dict[str, Any], where: str, remedy: str) -> "EvalConfig":
    from pydantic import ValidationError

    from eval.config import EvalConfig
    from train.errors import ConfigError

    try:
        return EvalConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("eval", *map(str, first["loc"])))
        rule = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        raise ConfigError(f"{where}{key}: {rule}, not {first['input']!r}; {remedy}.") from None
