"""The options that the evaluations share: groups of them, and how a command takes a group.

    @grouped
    def knn(checkpoint: Checkpoint, k: ..., images: ImageOptions, output: OutputOptions) -> None:

gives the command every field of the groups as an option of its own.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from tools.options import Device, Json, ResultFile

if TYPE_CHECKING:
    from eval.config import EvalConfig
    from model.weights import BackboneWeights

Options = dict[str, dict[str, Any]]  # by section and key of EvalConfig; None where not given


@dataclass(frozen=True)
class ImageOptions:
    """How images reach the backbone; None where the run's own settings count."""

    image_size: Annotated[
        int | None, typer.Option(help="Side of the crops, in pixels; default: the run's own, or 224.")
    ] = None
    resize: Annotated[
        int | None,
        typer.Option(help="Short side before a centre crop, in pixels; default: the run's own, or 256."),
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(help="Images in one pass of the backbone; default: the run's own, or 256.")
    ] = None
    workers: Annotated[int | None, typer.Option(help="Decoding processes; default: the run's own, or 8.")] = (
        None
    )

    def given(self) -> Options:
        """For `eval_settings`."""
        return {"features": asdict(self)}


@dataclass(frozen=True)
class RankOptions:
    """How the work is shared out, and where the unfinished is kept."""

    procs: Annotated[
        int | None, typer.Option(min=1, help="Local processes; default one per GPU, or 1 without a GPU.")
    ] = None
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where unfinished work is kept, to go on from; it is removed at the end.",
            show_default="beside the result",
        ),
    ] = None


@dataclass(frozen=True)
class OutputOptions:
    """Where to compute and where the result goes."""

    device: Device = "auto"
    out: ResultFile = None
    as_json: Json = False


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the fields of its groups as parameters, for Typer to make options of."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            of_field = get_type_hints(groups[name], include_extras=True)
            parameters += [
                parameter.replace(name=f.name, default=f.default, annotation=of_field[f.name])
                for f in fields(groups[name])
            ]
        else:
            parameters.append(parameter)
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


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
