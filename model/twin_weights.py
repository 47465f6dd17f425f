"""Whole twins on disk: the backbone of `model.weights` with the projector that was trained with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.authors_layout import BACKBONE, PROJECTOR, network_state
from model.config import ModelConfig
from model.errors import ModelError
from model.tensor_files import read_tensor_file
from model.twin import Twin
from model.weights import (
    BackboneWeights,
    backbone_weights,
    describe_architecture,
    differences,
    with_counters,
)


@dataclass(frozen=True)
class TwinWeights:
    """A trained backbone and, unless the file holds a backbone alone, its projector."""

    backbone: BackboneWeights
    projector: dict[str, Tensor] | None  # under the names of `model.twin.build_projector`
    widths: str | None  # of the projector, as in `model.projector`: 8192-8192-8192
    content: Mapping[str, Any]  # all that the file holds

    @property
    def state(self) -> dict[str, Tensor]:
        """Under the names of `Twin`."""
        return {
            **{BACKBONE + name: value for name, value in self.backbone.state.items()},
            **{PROJECTOR + name: value for name, value in (self.projector or {}).items()},
        }

    def outline(self) -> Twin:
        """The twin that the file holds, without content: for the order, names and shapes of its tensors."""
        return _outline(self.backbone, self.widths)


def read_twin_weights(path: Path) -> TwinWeights:
    """The twin in any of the files that `model.weights` reads, on the CPU; raises `ModelError`."""
    path = Path(path)
    file = read_tensor_file(path)
    backbone = backbone_weights(file, path)
    network = network_state(file.content) or {}
    rest = {name: value for name, value in network.items() if not name.startswith(BACKBONE)}
    if not rest:
        return TwinWeights(backbone, None, None, file.content)
    if any(value.untyped_storage().nbytes() < value.nbytes for value in rest.values()):
        raise ModelError(f"{path} claims more numbers than it holds; pass an intact checkpoint.")
    widths = _widths(rest)
    expected = _outline(backbone, widths).state_dict() if widths else {}
    shapes = {name: tuple(v.shape) for name, v in expected.items() if name.startswith(PROJECTOR)}
    rest = with_counters(rest, shapes)
    misfit = differences(rest, shapes)
    if not widths or misfit:
        raise ModelError(
            f"{path} holds no projector that fits its {backbone.architecture}: {misfit or 'no layers'}; pass "
            f"an intact checkpoint, or a backbone alone."
        )
    projector = {name.removeprefix(PROJECTOR): rest[name] for name in shapes}
    return TwinWeights(backbone, projector, widths, file.content)


def start_from(twin: Twin, config: ModelConfig, path: Path) -> TwinWeights:
    """Give `twin`, built with `config`, the weights and batch-norm statistics in the file at `path`.

    Where that is a backbone alone, the projector stays as it is. Optimiser states are not taken over. Raises
    `ModelError`, with the twin unchanged, where the file cannot be read or does not fit.
    """
    weights = read_twin_weights(path)
    expected = describe_architecture(config.backbone, config.small_stem)
    if weights.backbone.architecture != expected:
        raise ModelError(
            f"{path} holds {weights.backbone.architecture}, but the run's backbone is {expected}; set "
            f"model.backbone and model.small_stem to what the file holds, or start from another one."
        )
    if weights.widths not in (None, "-".join(map(str, config.projector_widths))):
        raise ModelError(
            f"The projector in {path} has the widths {weights.widths}, but model.projector is "
            f"{config.projector}; set it to the file's, or start from the backbone alone, as "
            f"fastbarlow export writes it."
        )
    if not all(value.isfinite().all() for value in weights.state.values()):
        raise ModelError(f"The weights in {path} are not all finite; start from another file.")
    twin.load_state_dict(weights.state, strict=False)  # all but the projector's names have been compared
    return weights


def _widths(projector: Mapping[str, Tensor]) -> str | None:
    """Of the layers named `projector.NUMBER.weight`, in the order of their numbers; None without layers."""
    widths = {}
    for name, value in projector.items():
        number, _, kind = name.removeprefix(PROJECTOR).partition(".")
        if number.isdecimal() and kind == "weight" and value.dim() == 2:
            widths[int(number)] = len(value)
    if not widths or 0 in widths.values():
        return None
    return "-".join(str(width) for _, width in sorted(widths.items()))


def _outline(backbone: BackboneWeights, widths: str | None) -> Twin:
    config = ModelConfig(backbone=backbone.name, small_stem=backbone.small_stem, norm="torch")
    with torch.device("meta"):
        return Twin(config.model_copy(update={"projector": widths}))
