"""Trained backbones on disk: the run's checkpoint, and state dicts in torchvision's layout.

Three kinds of file are read, none of which can run code:

1. a checkpoint of `train.checkpoint` (`checkpoint.pt`): the architecture is the one in its config
2. a state dict in torchvision's layout (`.pth`, also the authors' `resnet50.pth`)
3. the same tensors as `.safetensors`

For 2 and 3 the architecture is the one whose tensor names and shapes are in the file; a classifier (`fc.*`)
is left out.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.backbones import BACKBONES, build_backbone
from model.errors import ModelError

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
        return _describe(self.name, self.small_stem)

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

    Raises `ModelError` where the file is missing, damaged, holds no ResNet, or holds tensors that do not fit
    the architecture.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        content, normalisation = _read_safetensors(path)
    else:
        content, normalisation = _read_pickle(path), IMAGENET
    if isinstance(content, Mapping) and {"config", "model"} <= content.keys():
        return _from_checkpoint(content, path)
    return _from_state_dict(content, normalisation, path)


def load_intact(path: Path, map_location: torch.device | str = "cpu") -> Any:
    """What `torch.save` wrote to `path`, its checksums compared, which `torch.load` itself does not.

    Files of before torch 1.6 have none. Raises `OSError` where the file cannot be read, and `ValueError`
    where it is damaged, of another kind, or would run code.
    """
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    try:
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} does not have its checksum")
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # damaged bytes make the reader fail in a dozen different ways
        raise ValueError(f"{path}: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        return load_intact(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise _damaged(path) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Normalisation]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise _damaged(path) from error
    try:
        mean, std = (
            tuple(map(float, json.loads(metadata.get(key, json.dumps(default)))))
            for key, default in IMAGENET._asdict().items()
        )
    except (ValueError, TypeError) as error:
        raise _damaged(path) from error
    return state, Normalisation(mean, std)


def _from_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> BackboneWeights:
    try:
        model, augment = checkpoint["config"]["model"], checkpoint["config"]["data"]["augment"]
        name, small_stem = model["backbone"], model["small_stem"]
        normalisation = Normalisation(tuple(augment["mean"]), tuple(augment["std"]))
        eval_settings = checkpoint["config"].get("eval")
        shapes = _shapes_of(name, small_stem)
        prefix = "backbone."
        state = {k.removeprefix(prefix): v for k, v in checkpoint["model"].items() if k.startswith(prefix)}
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a checkpoint of fastbarlow: its config names no known backbone; "
            f"pass the run's checkpoint.pt or an exported file."
        ) from error
    state = _with_counters(state, shapes)
    weights = BackboneWeights(name, small_stem, normalisation, state, eval_settings)
    differences = _differences(weights.state, shapes)
    if differences:
        raise ModelError(
            f"The config in {path} says {weights.architecture}, but its backbone does not fit that: "
            f"{differences}; pass an intact checkpoint."
        )
    return weights


def _from_state_dict(content: Any, normalisation: Normalisation, path: Path) -> BackboneWeights:
    is_state = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    if not is_state or "conv1.weight" not in content:
        raise ModelError(
            f"{path} holds neither a checkpoint of fastbarlow nor a ResNet in torchvision's layout; "
            f"pass the run's checkpoint.pt or an exported file."
        )
    state = {key: value for key, value in content.items() if not key.startswith("fc.")}
    found = {(key, tuple(value.shape)) for key, value in state.items()}
    candidates = {
        (name, small_stem): _shapes_of(name, small_stem) for name in BACKBONES for small_stem in (False, True)
    }
    (name, small_stem), shapes = min(candidates.items(), key=lambda item: len(found ^ set(item[1].items())))
    weights = BackboneWeights(name, small_stem, normalisation, _with_counters(state, shapes))
    differences = _differences(weights.state, shapes)
    if differences:
        raise ModelError(
            f"{path} is most like {weights.architecture}, but does not fit that: {differences}; "
            f"pass a backbone of one of the architectures {', '.join(BACKBONES)}."
        )
    return weights


@cache
def _shapes_of(name: str, small_stem: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in build_backbone(name, small_stem).state_dict().items()}


def _with_counters(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`state` with the step counters of batch-norm, which old files lack and evaluation does not use."""
    counters = {key for key in shapes if key.endswith(".num_batches_tracked")}
    return state | {key: torch.tensor(0) for key in counters - state.keys()}


def _differences(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> str:
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


def _describe(name: str, small_stem: bool) -> str:
    return f"{name} with the small stem" if small_stem else name


def _unreadable(path: Path, error: OSError) -> ModelError:
    reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
    return ModelError(f"Cannot read the weights {path}: {reason}; pass a checkpoint.pt or an exported file.")


def _damaged(path: Path) -> ModelError:
    return ModelError(
        f"{path} is damaged, cut short or no file of weights; pass a checkpoint.pt or an exported file."
    )
