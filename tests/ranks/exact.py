"""One rank of the tests of exactness: trains the runs of the recipes given, one after the other.

All runs share one process group, since a process takes longer to start than a run takes.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torchvision.models.resnet import ResNet

import model.backbones
import train.loop
from train.config import load_config
from train.distributed import process_group


class ThinResNet(ResNet):
    """One block of each stage, with an eighth of its channels, so that a step takes milliseconds."""

    def __init__(self, block: type[nn.Module], depths: list[int], **options: object) -> None:
        super().__init__(block, [1] * len(depths), **options)
        self.fc = nn.Linear(self.inplanes, 1)  # what the width of the features is read from

    def _make_layer(self, block: type[nn.Module], planes: int, *args: object, **options: object) -> nn.Module:
        return super()._make_layer(block, planes // 8, *args, **options)


def main(recipes: list[Path]) -> None:
    torch.set_num_threads(1)
    model.backbones.ResNet = ThinResNet
    with process_group("cpu") as world:
        train.loop.process_group = lambda device: nullcontext(world)
        for recipe in recipes:
            train.loop.pretrain(load_config(recipe))


if __name__ == "__main__":
    main([Path(recipe) for recipe in sys.argv[1:]])
