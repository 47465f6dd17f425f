"""`fastbarlow export`: a trained network as a file for use elsewhere, with its model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.console import say, show_json
from tools.options import Checkpoint, Json

if TYPE_CHECKING:
    from tools.export import Exported


def export(
    checkpoint: Checkpoint,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="File to write: .pth, .safetensors, .onnx, .pt2, .ts or .torchscript."
        ),
    ],
    with_projector: Annotated[
        bool, typer.Option("--with-projector", help="Write the whole network, not the backbone alone.")
    ] = False,
    card: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Your own words for the model card: owner, contact, licence, intended_use, disallowed_use, "
            "datasets, hardware.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the trained backbone alone, or the whole network, for use elsewhere, and a model card.

    The file takes its name only after it has been read back, and its outputs on random images are those of
    CHECKPOINT to 1e-5 of their scale; the difference is printed.

    A .pth file is a state dict in torchvision's layout, without the classifier; load it with
    load_state_dict(torch.load(path), strict=False), or any of the backbones with torch.hub.load and this
    checkout's hubconf.py. A .safetensors file holds the same tensors and, as metadata, the architecture and
    the normalisation of the images.

    ONNX (.onnx), torch.export (.pt2) and TorchScript (.ts, .torchscript) files hold the network as a program,
    and the same metadata. It takes normalised float32 images, (N, 3, H, W) of any number and size, and gives
    features (N, F).

    With the projector, a .pth file is a checkpoint.pth from which the authors' code goes on, optimiser
    included, a .safetensors file has the names backbone.* and projector.*, and a program gives features and
    embeddings.

    The card, OUT's name with .card.md and .card.json, has the checksums of both files, and what is known of
    objective, data, training and evaluations, as Hugging Face lays it out; what is not known it says so.

    Examples

        fastbarlow export runs/a/checkpoint.pt resnet50.pth
        fastbarlow export runs/a/checkpoint.pt resnet50.onnx --card about.yaml
        fastbarlow export runs/a/checkpoint.pt checkpoint.pth --with-projector
    """
    from tools.export import export_backbone, export_twin
    from tools.model_card import OwnerTexts, read_owner_texts, write_card

    owner = OwnerTexts() if card is None else read_owner_texts(card)
    exported = (export_twin if with_projector else export_backbone)(checkpoint, out)
    card_path, json_path = write_card(exported, owner)
    say(_sentence(exported), as_json=as_json)
    if out.suffix == ".pth" and exported.weights.backbone.small_stem:
        say(
            f"torchvision's {exported.weights.backbone.name} has no small stem: give it one before it loads "
            f"this file, as the card shows, or load it with torch.hub and hubconf.py.",
            as_json=as_json,
        )
    say(f"Model card: {card_path}, and {json_path} for programs.", as_json=as_json)
    if as_json:
        show_json(
            {
                "file": str(exported.path),
                "sha256": exported.sha256,
                "checkpoint_sha256": exported.checkpoint_sha256,
                "difference": exported.difference,
                "reader": exported.reader,
                "card": str(card_path),
                "card_json": str(json_path),
            }
        )


def _sentence(exported: "Exported") -> str:
    weights = exported.weights
    what = weights.backbone.architecture
    if weights.projector is not None:
        what += f" with projector {weights.widths}"
    same = "the checkpoint's to the bit"
    if exported.difference:
        same = f"within {exported.difference:.1e} of the checkpoint's, of their scale"
    return (
        f"{exported.path}: {what}, {exported.format}, {exported.bytes / 1e6:.1f} MB; read back with "
        f"{exported.reader}, its outputs are {same}."
    )
