"""Files that hold tensors by name: `.pth` in torchvision's and the authors' layout, and `.safetensors`.

A backbone as `.pth`: `torchvision.models.resnet50().load_state_dict(torch.load(path), strict=False)` misses
only `fc.*`. With the small stem the network must first be given that stem, which `hubconf.py` does. A whole
twin as `.pth` is a `checkpoint.pth` from which the authors' code goes on, with the number of whole epochs
done and the momenta, where there are any; see `model.authors_layout`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from model.authors_layout import authors_checkpoint
from model.errors import ModelError
from model.tensor_files import is_plain
from model.twin_weights import TwinWeights, read_twin_weights
from model.weights import IMAGENET
from tools.export.network import build_encoder, metadata_of
from tools.export.verify import Loaded
from train.config import OptimConfig

Writer = Callable[[BinaryIO], None]


def prepare_pth(weights: TwinWeights, checkpoint: Path, out: Path) -> Writer:
    """Raises `ModelError` where the file could not say which images the network expects, or the optimiser's
    state is another network's.
    """
    if weights.backbone.normalisation != IMAGENET:
        mean, std = weights.backbone.normalisation
        raise ModelError(
            f"Cannot export to {out}: a .pth file cannot say that the backbone expects images normalised "
            f"by the mean {mean} and the deviation {std}; export to .safetensors."
        )
    if weights.projector is None:
        content = {name: value.contiguous() for name, value in weights.backbone.state.items()}
    else:
        content = _authors_checkpoint(weights, checkpoint)
    return lambda file: torch.save(content, file)


def prepare_safetensors(weights: TwinWeights, checkpoint: Path, out: Path) -> Writer:
    state = weights.backbone.state if weights.projector is None else weights.state
    tensors = {name: value.contiguous() for name, value in state.items()}
    metadata = {"format": "pt", **metadata_of(weights)}
    return lambda file: file.write(safetensors.torch.save(tensors, metadata))


def load_tensors(path: Path) -> Loaded:
    """As `fastbarlow eval` reads either kind of file."""
    return Loaded(build_encoder(read_twin_weights(path)), f"torch {torch.__version__}")


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
