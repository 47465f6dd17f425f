"""Trained backbones on disk: the run's checkpoint, the authors' files, and exported ones.

Four kinds of file are read, none of which can run code:

1. a checkpoint of `train.checkpoint` (`checkpoint.pt`): the architecture is the one in its config
2. a checkpoint of the authors' code (`checkpoint.pth`), or the state dict of a whole twin
3. a state dict of a ResNet in torchvision's layout (`.pth`, also the authors' `resnet50.pth`)
4. the tensors of 2 or 3 as `.safetensors`

For 2 to 4 the architecture is the one whose tensor names and shapes are in the file; a classifier (`fc.*`)
is left out. `model.twin_weights` reads the projector of the same files.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.authors_layout import BACKBONE, network_state
from model.backbones import BACKBONES, build_backbone
from model.errors import ModelError
from model.tensor_files import TensorFile, damaged, read_tensor_file

NUM_NAMED = 3  # tensors named in an error message, per kind of mismatch


class Normalisation(NamedTuple):
    """Per-channel statistics of images in 0..1 that a backbone was trained with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class BackboneWeights:
    """A trained backbone: what it is, which images it expects, its tensors under torchvision's names."""

    name: str  # a key of BACKBONES
    small_stem: bool
    normalisation: Normalisation
    state: dict[str, Tensor]
    eval_settings: dict[str, Any] | None = None  # the run's own; exported files have none

    @property
    def architecture(self) -> str:
        return describe_architecture(self.name, self.small_stem)

    def build(self) -> nn.Module:
        """The backbone in evaluation mode, float32, on the CPU; maps (N, 3, H, W) to (N, `feature_dim`)."""
        with torch.device("meta"):  # draws no random numbers
            backbone = build_backbone(self.name, self.small_stem)
        backbone.to_empty(device="cpu").load_state_dict(self.state)
        return backbone.eval()


def load_backbone(path: Path) -> nn.Module:
    """The backbone of a checkpoint or an exported file; see `BackboneWeights.build`. Raises `ModelError`."""
    return read_weights(path).build()


def read_weights(path: Path) -> BackboneWeights:
    """The backbone in the file at `path`, on the CPU.

    Raises `ModelError` where the file is missing, damaged, would run code, holds no ResNet, or holds tensors
    that do not fit the architecture.
    """
    path = Path(path)
    return backbone_weights(read_tensor_file(path), path)


def backbone_weights(file: TensorFile, path: Path) -> BackboneWeights:
    """The backbone in what was read from `path`. Raises `ModelError` as `read_weights`."""
    network = network_state(file.content)
    if network is None:
        raise ModelError(
            f"{path} holds neither a checkpoint of fastbarlow nor a ResNet in torchvision's or the authors' "
            f"layout; pass the run's checkpoint.pt or an exported file."
        )
    state = {name.removeprefix(BACKBONE): v for name, v in network.items() if name.startswith(BACKBONE)}
    if {"config", "model"} <= file.content.keys():
        return _from_checkpoint(file.content["config"], state, path)
    return _from_state_dict(state, _normalisation_in(file.metadata, path), path)


def _from_checkpoint(config: Any, state: dict[str, Tensor], path: Path) -> BackboneWeights:
    try:
        model, augment = config["model"], config["data"]["augment"]
        name, small_stem = model["backbone"], model["small_stem"]
        normalisation = _checked(augment["mean"], augment["std"])
        eval_settings = config.get("eval")
        shapes = _shapes_of(name, small_stem)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"{path} is not a checkpoint of fastbarlow: its config names no known backbone, or no "
            f"normalisation; pass the run's checkpoint.pt or an exported file."
        ) from error
    weights = BackboneWeights(name, small_stem, normalisation, with_counters(state, shapes), eval_settings)
    found = differences(weights.state, shapes)
    if found:
        raise ModelError(
            f"The config in {path} says {weights.architecture}, but its backbone does not fit that: "
            f"{found}; pass an intact checkpoint."
        )
    return weights


def _from_state_dict(state: dict[str, Tensor], normalisation: Normalisation, path: Path) -> BackboneWeights:
    found = {(key, tuple(value.shape)) for key, value in state.items()}
    candidates = {
        (name, small_stem): _shapes_of(name, small_stem) for name in BACKBONES for small_stem in (False, True)
    }
    (name, small_stem), shapes = min(candidates.items(), key=lambda item: len(found ^ set(item[1].items())))
    weights = BackboneWeights(name, small_stem, normalisation, with_counters(state, shapes))
    misfit = differences(weights.state, shapes)
    if misfit:
        raise ModelError(
            f"{path} is most like {weights.architecture}, but does not fit that: {misfit}; "
            f"pass a backbone of one of the architectures {', '.join(BACKBONES)}."
        )
    return weights


def _normalisation_in(metadata: Mapping[str, str], path: Path) -> Normalisation:
    try:
        mean, std = (
            json.loads(metadata.get(key, json.dumps(default))) for key, default in IMAGENET._asdict().items()
        )
        return _checked(mean, std)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(path) from error


def _checked(mean: Any, std: Any) -> Normalisation:
    """Raises `ValueError`, `TypeError` or `OverflowError` unless these are for each of three colours."""
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"mean {mean} and deviation {std} do not normalise three colours")
    return Normalisation(mean, std)


@cache
def _shapes_of(name: str, small_stem: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in build_backbone(name, small_stem).state_dict().items()}


def with_counters(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`state` with the step counters of batch-norm, which old files lack and evaluation does not use."""
    counters = {key for key in shapes if key.endswith(".num_batches_tracked")}
    return state | {key: torch.tensor(0) for key in counters - state.keys()}


def differences(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> str:
    """What keeps `state` from fitting `shapes`, with the first few names; empty where it fits."""
    missing = [key for key in shapes if key not in state]
    unexpected = [key for key in state if key not in shapes]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    return "; ".join(f"{kind} {_first(names)}" for kind, names in kinds.items() if names)


def _first(names: list[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def describe_architecture(name: str, small_stem: bool) -> str:
    return f"{name} with the small stem" if small_stem else name
