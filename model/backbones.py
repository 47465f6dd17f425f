"""Encoders: torchvision's ResNets without their classifier.

Shape legend: N samples, C channels, H and W pixels.
"""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from model.norm import ApexBatchNorm, TwinBatchNorm

# By name, the block and the number of blocks in each stage.
BACKBONES = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
NORMS = {"torch": nn.BatchNorm2d, "twin": TwinBatchNorm, "apex": ApexBatchNorm}


class _FusedBasicBlock(BasicBlock):
    """Torchvision's block; its norms add the residual and apply the ReLU."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.bn1.relu = self.bn2.relu = True

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)


class _FusedBottleneck(Bottleneck):
    """Torchvision's block; its norms add the residual and apply the ReLU."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.bn1.relu = self.bn2.relu = self.bn3.relu = True

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(y), identity)


_FUSED_BLOCKS = {BasicBlock: _FusedBasicBlock, Bottleneck: _FusedBottleneck}


def build_backbone(
    name: str, small_stem: bool = False, zero_init_residual: bool = True, norm: str = "torch"
) -> ResNet:
    """Randomly initialised encoder that maps images (N, 3, H, W) to features (N, `feature_dim`).

    `small_stem` replaces the 7x7 stride-2 convolution and the max-pooling by one 3x3 stride-1 convolution,
    as is usual for 32-pixel images (He et al. 2016, section 4.2). State-dict names stay torchvision's, and
    the weights drawn are the same, whatever `norm`, a key of `NORMS`, is. Raises `ModelError` where apex is
    not installed.
    """
    block, depths = BACKBONES[name]
    is_fused = norm != "torch"
    backbone = ResNet(
        _FUSED_BLOCKS[block] if is_fused else block,
        depths,
        zero_init_residual=zero_init_residual,
        norm_layer=NORMS[norm],
    )
    backbone.feature_dim = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if is_fused:
        backbone.bn1.relu = True
        backbone.relu = nn.Identity()
    if small_stem:
        give_small_stem(backbone)
    return backbone


def give_small_stem(network: ResNet) -> None:
    """Put a 3x3 stride-1 convolution, newly drawn, in the place of the stem, without pooling."""
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
