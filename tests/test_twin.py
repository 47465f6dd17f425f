"""The twin network: the paper's projector, torchvision's backbones, statistics per view."""

import pytest
import torch
import torchvision
from pydantic import ValidationError

from model.backbones import BACKBONES, build_backbone
from model.config import ModelConfig
from model.twin import Twin


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_is_torchvisions_without_the_classifier(name: str) -> None:
    with torch.device("meta"):
        ours = build_backbone(name).state_dict()
        theirs = getattr(torchvision.models, name)().state_dict()
    assert {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")} == {
        k: v.shape for k, v in ours.items()
    }


def test_last_norm_of_each_block_starts_at_zero() -> None:
    backbone = build_backbone("resnet18")
    assert all(block.bn2.weight.eq(0).all() for block in backbone.layer1)


def test_small_stem_keeps_the_resolution() -> None:
    backbone = build_backbone("resnet18", small_stem=True)
    assert backbone.maxpool(backbone.relu(backbone.conv1(torch.zeros(1, 3, 32, 32)))).shape[-2:] == (32, 32)


def test_projector_has_the_papers_layers() -> None:
    with torch.device("meta"):
        twin = Twin(ModelConfig(backbone="resnet50"))
    shapes = {name: tuple(p.shape) for name, p in twin.projector.named_parameters()}
    assert shapes == {
        "0.weight": (8192, 2048),
        "1.weight": (8192,),
        "1.bias": (8192,),
        "3.weight": (8192, 8192),
        "4.weight": (8192,),
        "4.bias": (8192,),
        "6.weight": (8192, 8192),
    }


def test_each_view_is_normalised_by_its_own_statistics() -> None:
    torch.manual_seed(0)
    twin = Twin(ModelConfig(backbone="resnet18", projector="16-8")).double()
    views = torch.randn(2, 4, 3, 32, 32).double()
    views[1] = views[1] * 5 + 3
    z_a, z_b = twin(views)
    alone = Twin(ModelConfig(backbone="resnet18", projector="16-8")).double()
    alone.load_state_dict(twin.state_dict())
    torch.testing.assert_close(alone(views.flip(0)), (z_b, z_a))


@pytest.mark.parametrize("projector", ["", "8192-", "12-x", "0-8", "-5"])
def test_projector_widths_that_are_no_widths_are_refused(projector: str) -> None:
    with pytest.raises(ValidationError, match="widths joined by '-'"):
        ModelConfig(projector=projector)
