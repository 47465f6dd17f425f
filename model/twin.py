"""The twin network: one encoder and one projector that both views pass through.

Shape legend: V views (2), N samples of this rank, C colours (3), H and W pixels, D embedding width.
"""

from itertools import pairwise

from torch import Tensor, nn

from model.backbones import build_backbone
from model.config import ModelConfig


def build_projector(feature_dim: int, widths: list[int]) -> nn.Sequential:
    """Linear, batch-norm and ReLU per hidden width, then a bare linear layer (paper section 2.2).

    Layer positions, and so the state-dict names, are those of the authors' code.
    """
    layers: list[nn.Module] = []
    sizes = [feature_dim, *widths]
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [
            nn.Linear(fan_in, fan_out, bias=False),
            nn.BatchNorm1d(fan_out),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=False))
    return nn.Sequential(*layers)


class Twin(nn.Module):
    """Backbone and projector; each view is a batch of its own, so batch-norm statistics are per view."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone, config.small_stem, config.zero_init_residual)
        self.projector = build_projector(self.backbone.feature_dim, config.projector_widths)

    def forward(self, views_VNCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of both views, (N, D) each, in the precision of the surrounding autocast."""
        view_a_NCHW, view_b_NCHW = views_VNCHW
        return self.projector(self.backbone(view_a_NCHW)), self.projector(self.backbone(view_b_NCHW))
