"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

DEMO_CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML recipe, such as those in configs/.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that replace the recipe's, such as train.epochs=100 or data.loader=dali.",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto takes the GPU if there is one.")
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as one JSON object, the only line on standard output; the rest on error.",
    ),
]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A run's checkpoint.pt, or a .pth or .safetensors file.")
]
ResultFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE.json",
        help="Where the result goes.",
        show_default="eval/, beside the checkpoint",
    ),
]
