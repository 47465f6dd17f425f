"""The twin network: the paper's projector, torchvision's backbones, statistics per view."""

import numpy as np
import pytest
import torch
import torchvision
from pydantic import ValidationError

from model.backbones import BACKBONES, build_backbone
from model.config import ModelConfig
from model.norm import TwinBatchNorm
from model.twin import Twin
from pipelines.augment import distort
from pipelines.config import AugmentConfig
from pipelines.draw import draw_views


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


def twins(config: dict, dtype: torch.dtype) -> tuple[Twin, Twin]:
    """The joined twin, and the same weights in one with a pass for each view."""
    torch.manual_seed(0)
    joined = Twin(ModelConfig(projector="16-12-8", zero_init_residual=False, **config)).to(dtype)
    separate = Twin(ModelConfig(projector="16-12-8", norm="torch", **config)).to(dtype)
    separate.load_state_dict(joined.state_dict())
    return joined, separate


def run(twin: Twin, views: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Embeddings, and the gradients of an objective that couples the views."""
    twin.zero_grad()
    embeddings = twin(views)
    (embeddings[0] * embeddings[1].flip(0) + embeddings[0].sin()).sum().backward()
    return [z.detach() for z in embeddings], [p.grad for p in twin.parameters()]


@pytest.mark.parametrize(("backbone", "small_stem"), [("resnet18", True), ("resnet50", False)])
def test_joined_pass_equals_a_pass_for_each_view(backbone: str, small_stem: bool) -> None:
    joined, separate = twins({"backbone": backbone, "small_stem": small_stem}, torch.float64)
    size = 24 if small_stem else 64
    views = torch.randn(2, 5, 3, size, size, dtype=torch.float64)
    views[1] = views[1] * 5 + 3
    exactly = {"rtol": 1e-10, "atol": 1e-10}
    for _ in range(2):
        ours, expected = run(joined, views), run(separate, views)
        torch.testing.assert_close(ours[0], expected[0], **exactly)
        for actual, true in zip(ours[1], expected[1], strict=True):
            assert (actual - true).norm() <= 1e-10 * true.norm()
        torch.testing.assert_close(joined.state_dict(), separate.state_dict(), **exactly)
    assert joined.backbone.bn1.num_batches_tracked == 4
    torch.testing.assert_close(joined.eval()(views), separate.eval()(views), **exactly)


def test_float32_embeddings_equal_those_of_separate_passes() -> None:
    """Gradients are compared in float64 above, and layer by layer in float32 in test_norm.py.

    Here they would tell nothing: where a ReLU's input rounds to the other side of 0, the gradients of either
    network are up to 5e-3 from float64's.
    """
    config = {"backbone": "resnet18", "small_stem": True}
    joined, separate = (twin.to(memory_format=torch.channels_last) for twin in twins(config, torch.float32))
    exact = twins(config, torch.float64)[0]
    exact.load_state_dict(joined.state_dict())
    views = torch.randn(2, 24, 16, 16, 3).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        ours, theirs, true = (
            torch.cat(twin(each)).double()
            for twin, each in zip((joined, separate, exact), (views, views, views.double()), strict=True)
        )
    assert (ours - true).norm() <= 1.5 * (theirs - true).norm() + 1e-6 * true.norm()
    torch.testing.assert_close(joined.state_dict(), separate.state_dict(), rtol=1e-5, atol=1e-5)


def test_views_of_the_distortions_are_joined_without_a_copy() -> None:
    config = AugmentConfig()
    crops = torch.randint(256, (2, 3, 16, 16, 3), dtype=torch.uint8)
    size = np.full(3, 16)
    params = draw_views(config.views, 0, 0, np.arange(3), size, size)
    views = distort(crops, params, config, torch.float32)
    joined = views.flatten(0, 1)
    assert joined.data_ptr() == views.data_ptr()
    assert joined.is_contiguous(memory_format=torch.channels_last)


def test_part_of_a_twin_trained_alone_has_one_view() -> None:
    """As in fine-tuning: the batch of a backbone that is called itself is not taken for two views."""
    joined, separate = twins({"backbone": "resnet18", "small_stem": True}, torch.float64)
    joined(torch.randn(2, 4, 3, 8, 8).double())
    separate.load_state_dict(joined.state_dict())
    images = torch.randn(6, 3, 8, 8).double() * torch.arange(1, 7).view(6, 1, 1, 1)
    torch.testing.assert_close(joined.backbone(images), separate.backbone(images), rtol=1e-10, atol=1e-10)


def test_networks_of_all_norms_draw_the_same_weights() -> None:
    states = []
    for norm in ("torch", "twin"):
        torch.manual_seed(3)
        states.append(Twin(ModelConfig(backbone="resnet18", norm=norm, projector="8-8")).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    theirs = torchvision.models.resnet18().state_dict()
    backbone = {k.removeprefix("backbone."): v for k, v in states[1].items() if k.startswith("backbone.")}
    assert {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")} == {
        k: v.shape for k, v in backbone.items()
    }


@pytest.mark.parametrize("sync_bn", ["all", "projector", "none"])
def test_norms_that_are_synchronised(sync_bn: str) -> None:
    twin = Twin(ModelConfig(backbone="resnet18", sync_bn=sync_bn, projector="8-8-8"))
    twin.synchronise_norms()
    norms = [(name, m) for name, m in twin.named_modules() if isinstance(m, TwinBatchNorm)]
    assert len(norms) == 22
    for name, norm in norms:
        assert norm.synchronised is (sync_bn == "all" or (sync_bn == "projector" and "projector" in name))


@pytest.mark.parametrize("projector", ["", "8192-", "12-x", "0-8", "-5"])
def test_projector_widths_that_are_no_widths_are_refused(projector: str) -> None:
    with pytest.raises(ValidationError, match="widths joined by '-'"):
        ModelConfig(projector=projector)
