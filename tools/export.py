"""Write a trained backbone, without projector and optimiser, for use elsewhere.

- `.pth`: a state dict in torchvision's layout, as the authors' `resnet50.pth`;
  `torchvision.models.resnet50().load_state_dict(torch.load(path), strict=False)` misses only `fc.*`
- `.safetensors`: the same tensors, and as metadata the architecture and the normalisation of the images
"""

import io
import json
from pathlib import Path

import safetensors.torch
import torch

from model.errors import ModelError
from model.weights import IMAGENET, BackboneWeights, read_weights
from train.files import write_atomically


def export_backbone(checkpoint: Path, out: Path) -> BackboneWeights:
    """Write the backbone of `checkpoint` (or of an exported file) to `out`; the suffix says in which format.

    `out` is replaced in one atomic step. Raises `ModelError` where `checkpoint` cannot be read, `out` cannot
    be written or its format cannot hold the backbone.
    """
    out = Path(out)
    if out.suffix not in (".pth", ".safetensors"):
        raise ModelError(f"Cannot export to {out}: the name must end in .pth or .safetensors.")
    weights = read_weights(checkpoint)
    content = _to_pth(weights, out) if out.suffix == ".pth" else _to_safetensors(weights)
    try:
        write_atomically(out, lambda file: file.write(content))
    except OSError as error:
        raise ModelError(
            f"Cannot write {out}: {error.strerror}; choose a folder that exists and has room."
        ) from error
    return weights


def _to_pth(weights: BackboneWeights, out: Path) -> bytes:
    if weights.normalisation != IMAGENET:
        mean, std = weights.normalisation
        raise ModelError(
            f"Cannot export to {out}: a .pth file cannot say that the backbone expects images normalised "
            f"by the mean {mean} and the deviation {std}; export to .safetensors."
        )
    buffer = io.BytesIO()
    torch.save({key: value.contiguous() for key, value in weights.state.items()}, buffer)
    return buffer.getvalue()


def _to_safetensors(weights: BackboneWeights) -> bytes:
    metadata = {
        "format": "pt",
        "backbone": weights.name,
        "small_stem": json.dumps(weights.small_stem),
        "mean": json.dumps(weights.normalisation.mean),
        "std": json.dumps(weights.normalisation.std),
    }
    tensors = {key: value.contiguous() for key, value in weights.state.items()}
    return safetensors.torch.save(tensors, metadata)
