"""The network that is exported, and what a file of it has to say.

Shape legend: N images, C colours (3), H and W pixels, F feature width, D embedding width.
"""

import json

import torch
from torch import Tensor, nn

from model.backbones import build_backbone
from model.twin import build_projector
from model.twin_weights import TwinWeights

INPUT, OUTPUTS = "images", ("features", "embeddings")


class Encoder(nn.Module):
    """Normalised images (N, C, H, W) to features (N, F) and, with a projector, embeddings (N, D)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features_NF = self.backbone(images)
        return (features_NF,) if self.projector is None else (features_NF, self.projector(features_NF))


def build_encoder(weights: TwinWeights) -> Encoder:
    """In evaluation mode, float32, on the CPU."""
    with torch.device("meta"):  # draws no random numbers
        backbone = build_backbone(weights.backbone.name, weights.backbone.small_stem)
        projector = None
        if weights.widths is not None:
            widths = [int(width) for width in weights.widths.split("-")]
            projector = build_projector(backbone.feature_dim, widths, norm="torch")
        encoder = Encoder(backbone, projector)
    encoder.to_empty(device="cpu").load_state_dict(weights.state)
    return encoder.eval()


def metadata_of(weights: TwinWeights) -> dict[str, str]:
    """What it takes to use the tensors: text by name, JSON where it is not a name."""
    backbone = weights.backbone
    metadata = {
        "backbone": backbone.name,
        "small_stem": json.dumps(backbone.small_stem),
        "mean": json.dumps(backbone.normalisation.mean),
        "std": json.dumps(backbone.normalisation.std),
    }
    return metadata if weights.widths is None else {**metadata, "projector": weights.widths}
