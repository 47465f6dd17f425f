"""Encoders: torchvision's ResNets without their classifier."""

import torchvision
from torch import nn

BACKBONES = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
    "resnet101": torchvision.models.resnet101,
    "resnet152": torchvision.models.resnet152,
}


def build_backbone(name: str, small_stem: bool = False, zero_init_residual: bool = True) -> nn.Module:
    """Randomly initialised encoder that maps images (N, 3, H, W) to features (N, `feature_dim`).

    `small_stem` replaces the 7x7 stride-2 convolution and the max-pooling by one 3x3 stride-1 convolution,
    as is usual for 32-pixel images (He et al. 2016, section 4.2). State-dict names stay torchvision's.
    """
    backbone = BACKBONES[name](zero_init_residual=zero_init_residual)
    backbone.feature_dim = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if small_stem:
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone
