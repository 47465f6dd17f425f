"""The twin network: one encoder and one projector that both views pass through.

Shape legend: V views (2), N samples of this rank, M = V N, C colours (3), H and W pixels, F feature width,
D embedding width.
"""

from itertools import pairwise

from torch import Tensor, nn

from model.backbones import build_backbone
from model.config import ModelConfig
from model.norm import TwinBatchNorm, joined_views, synchronise_norms


def build_projector(feature_dim: int, widths: list[int], norm: str = "twin") -> nn.Sequential:
    """Linear, batch-norm and ReLU per hidden width, then a bare linear layer (paper section 2.2).

    Layer positions, and so the state-dict names, are those of the authors' code. `norm` is `ModelConfig`'s;
    apex has a batch-norm for images only, so there it is the twin's here.
    """
    layers: list[nn.Module] = []
    sizes = [feature_dim, *widths]
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers.append(nn.Linear(fan_in, fan_out, bias=False))
        if norm == "torch":
            layers += [nn.BatchNorm1d(fan_out), nn.ReLU(inplace=True)]
        else:
            layers += [TwinBatchNorm(fan_out, relu=True), nn.Identity()]
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=False))
    return nn.Sequential(*layers)


class Twin(nn.Module):
    """Backbone and projector; batch-norm statistics are per view.

    Both views pass in one batch, all samples of the first one first, which the norms are told. With
    `model.norm` torch each view is a pass of its own, as in the authors' code.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(
            config.backbone, config.small_stem, config.zero_init_residual, config.norm
        )
        self.projector = build_projector(self.backbone.feature_dim, config.projector_widths, config.norm)
        self._is_joined = config.norm != "torch"
        self._sync_bn = config.sync_bn

    def forward(self, views_VNCHW: Tensor, with_features: bool = False) -> tuple[Tensor, ...]:
        """Embeddings of both views, (N, D) each, in the precision of the surrounding autocast.

        `with_features` adds the backbone's features of the first view, (N, F), which carry no gradient.
        Views that are contiguous as channels-last, one after the other in memory, are joined without a copy.
        """
        if self._is_joined:
            norms = [module for module in self.modules() if isinstance(module, TwinBatchNorm)]
            with joined_views(norms, len(views_VNCHW)):
                features_MF = self.backbone(views_VNCHW.flatten(0, 1))
                z_a_ND, z_b_ND = self.projector(features_MF).chunk(2)
            features_NF, _ = features_MF.chunk(2)
        else:
            features_NF, features_b_NF = (self.backbone(view_NCHW) for view_NCHW in views_VNCHW)
            z_a_ND, z_b_ND = self.projector(features_NF), self.projector(features_b_NF)
        return (z_a_ND, z_b_ND, features_NF.detach()) if with_features else (z_a_ND, z_b_ND)

    def synchronise_norms(self) -> None:
        """Give the batch-norms that `model.sync_bn` names statistics over all ranks."""
        parts = {"all": [self.backbone, self.projector], "projector": [self.projector], "none": []}
        for part in parts[self._sync_bn]:
            synchronise_norms(part)
