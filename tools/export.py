"""Write trained networks for use elsewhere.

The backbone alone, without projector and optimiser:

- `.pth`: a state dict in torchvision's layout, as the authors' `resnet50.pth`;
  `torchvision.models.resnet50().load_state_dict(torch.load(path), strict=False)` misses only `fc.*`
- `.safetensors`: the same tensors, and as metadata the architecture and the normalisation of the images

The whole twin:

- `.pth`: a `checkpoint.pth` from which the authors' code goes on; see `model.authors_layout`
- `.safetensors`: the weights as `backbone.*` and `projector.*`, and the projector's widths in the metadata
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from model.authors_layout import authors_checkpoint
from model.errors import ModelError
from model.tensor_files import is_plain
from model.twin_weights import TwinWeights, read_twin_weights
from model.weights import IMAGENET, BackboneWeights, read_weights
from train.config import OptimConfig
from train.files import write_atomically


def export_backbone(checkpoint: Path, out: Path) -> BackboneWeights:
    """Write the backbone of `checkpoint` (or of an exported file) to `out`; the suffix says in which format.

    `out` is replaced in one atomic step. Raises `ModelError` where `checkpoint` cannot be read, `out` cannot
    be written or its format cannot hold the backbone.
    """
    out = _checked_name(out)
    weights = read_weights(checkpoint)
    if out.suffix == ".pth":
        content = _to_pth({key: value.contiguous() for key, value in weights.state.items()}, weights, out)
    else:
        content = _to_safetensors(weights.state, weights)
    _write(content, out)
    return weights


def export_twin(checkpoint: Path, out: Path) -> TwinWeights:
    """Write backbone and projector of `checkpoint` to `out`; the suffix says in which format.

    A `.pth` file also has the number of whole epochs done, from which the authors' code goes on, and the
    momenta, where `checkpoint` has any. Raises `ModelError` as `export_backbone`, and where there is no
    projector.
    """
    checkpoint, out = Path(checkpoint), _checked_name(out)
    weights = read_twin_weights(checkpoint)
    if weights.projector is None:
        raise ModelError(
            f"{checkpoint} holds a backbone alone; pass a run's checkpoint.pt, or leave out --with-projector."
        )
    if out.suffix == ".pth":
        content = _to_pth(_authors_checkpoint(weights, checkpoint), weights.backbone, out)
    else:
        content = _to_safetensors(weights.state, weights.backbone, projector=weights.widths)
    _write(content, out)
    return weights


def _authors_checkpoint(weights: TwinWeights, path: Path) -> dict[str, Any]:
    parameters = list(weights.outline().parameters())
    groups = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    shapes = [tuple(p.shape) for group in groups for p in group]
    try:
        epoch = _epochs_done(weights.content)
        momenta, options = _optimizer_of(weights.content)
        if any(tuple(mu.shape) != shapes[number] for number, mu in momenta.items()):
            raise ValueError("momenta of other shapes")
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ModelError(
            f"The optimiser's state in {path} does not fit its network; pass an intact checkpoint."
        ) from error
    return authors_checkpoint(weights.state, epoch, momenta, [len(group) for group in groups], options)


def _epochs_done(content: Mapping[str, Any]) -> int:
    """Whole ones: their code can go on from the end of an epoch only."""
    if "config" in content:
        batches = content["num_samples"] // content["config"]["train"]["batch_size"]
        return content["step"] // max(1, batches)
    return int(content.get("epoch", 0))


def _optimizer_of(content: Mapping[str, Any]) -> tuple[dict[int, Tensor], dict[str, float]]:
    """Momenta by the number of their parameter, and the options that all have; none and ours by default.

    Both our LARS and the authors' keep a state `mu`, and number the weights first.
    """
    optimizer = content.get("optimizer") or {"state": {}, "param_groups": []}
    momenta = {number: state["mu"] for number, state in optimizer["state"].items()}
    if not all(is_plain(mu) for mu in momenta.values()):
        raise ValueError("momenta that are no tensors")
    defaults = OptimConfig()
    options = {
        "lr": 0.0,
        "weight_decay": defaults.weight_decay,
        "momentum": defaults.momentum,
        "eta": defaults.eta,
    }
    for group in optimizer["param_groups"][:1]:  # that of the weights
        options = {name: float(group[name]) for name in options}
    return momenta, options


def _checked_name(out: Path) -> Path:
    out = Path(out)
    if out.suffix not in (".pth", ".safetensors"):
        raise ModelError(f"Cannot export to {out}: the name must end in .pth or .safetensors.")
    return out


def _to_pth(content: Mapping[str, Any], backbone: BackboneWeights, out: Path) -> bytes:
    if backbone.normalisation != IMAGENET:
        mean, std = backbone.normalisation
        raise ModelError(
            f"Cannot export to {out}: a .pth file cannot say that the backbone expects images normalised "
            f"by the mean {mean} and the deviation {std}; export to .safetensors."
        )
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _to_safetensors(state: Mapping[str, Tensor], backbone: BackboneWeights, **metadata: str) -> bytes:
    metadata |= {
        "format": "pt",
        "backbone": backbone.name,
        "small_stem": json.dumps(backbone.small_stem),
        "mean": json.dumps(backbone.normalisation.mean),
        "std": json.dumps(backbone.normalisation.std),
    }
    return safetensors.torch.save({key: value.contiguous() for key, value in state.items()}, metadata)


def _write(content: bytes, out: Path) -> None:
    try:
        write_atomically(out, lambda file: file.write(content))
    except OSError as error:
        raise ModelError(
            f"Cannot write {out}: {error.strerror}; choose a folder that exists and has room."
        ) from error
