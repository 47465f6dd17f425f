"""`torch.hub` gives torchvision's networks with the weights of any file that the project reads."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor

from model.backbones import BACKBONES
from model.errors import ModelError
from model.hub import PUBLISHED
from model.weights import IMAGENET, load_backbone, read_weights
from tests.authors_algorithm import BarlowTwins, Wrapped
from tools.export import export_backbone

ROOT = Path(__file__).resolve().parents[1]


def load(name: str, **kwargs: Any) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """What is to be found on the net, by URL; nothing else is."""
    served: dict[str, dict[str, Tensor]] = {}

    def load_state_dict_from_url(url: str, map_location: str, weights_only: bool) -> dict[str, Tensor]:
        assert map_location == "cpu" and weights_only
        if url not in served:
            raise URLError("no such host")
        return served[url]

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", load_state_dict_from_url)
    return served


def features_of(network: torch.nn.Module) -> Tensor:
    """(2, F), of a network without its classifier."""
    network.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return network.eval()(images)


def test_every_backbone_has_an_entry_and_nothing_else_has() -> None:
    module = torch.hub._import_module("hubconf", str(ROOT / "hubconf.py"))
    entries = {name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")}
    assert entries == BACKBONES.keys()
    assert all("torch" in module.dependencies and getattr(module, name).__doc__ for name in entries)


def test_another_package_of_the_same_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model.hub", None)
    with pytest.raises(ImportError, match=r"^Cannot import the package 'model' beside .*hubconf\.py .*\.$"):
        torch.hub._import_module("hubconf_of_the_test", str(ROOT / "hubconf.py"))


def test_our_files_give_the_features_of_the_checkpoint(tmp_path: Path, write_checkpoint: Callable) -> None:
    """With the small stem, which torchvision's network lacks, in place."""
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(checkpoint, model={"backbone": "resnet18", "small_stem": True})
    expected = features_of(load_backbone(checkpoint))
    assert (expected[0] != expected[1]).float().mean() > 0.5  # a live network
    files = [checkpoint]
    for name in ("backbone.pth", "backbone.safetensors"):
        files.append(tmp_path / name)
        export_backbone(checkpoint, files[-1])
    for file in files:
        network = load("resnet18", weights=file, num_classes=7)
        assert isinstance(network, torchvision.models.ResNet)
        assert network.fc.out_features == 7
        assert network.normalisation == IMAGENET
        assert torch.equal(features_of(network), expected)


def test_normalisation_is_that_of_the_run(tmp_path: Path, write_checkpoint: Callable) -> None:
    augment = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    write_checkpoint(tmp_path / "a.pt", model={"backbone": "resnet18"}, data={"augment": augment})
    network = load("resnet18", weights=str(tmp_path / "a.pt"))
    assert (
        network.normalisation
        == read_weights(tmp_path / "a.pt").normalisation
        == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    )


def test_the_authors_files_load(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = BarlowTwins("resnet18", (4, 4))
    torch.save({"epoch": 3, "model": Wrapped(theirs).state_dict()}, tmp_path / "checkpoint.pth")
    torch.save(theirs.backbone.state_dict(), tmp_path / "resnet18.pth")
    expected = features_of(theirs.backbone)
    for name in ("checkpoint.pth", "resnet18.pth"):
        assert torch.equal(features_of(load("resnet18", weights=tmp_path / name)), expected)


def test_resnet50_is_the_authors_by_default(downloads: dict) -> None:
    torch.manual_seed(2)
    theirs = torchvision.models.resnet50()
    published = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    downloads[PUBLISHED["resnet50"]] = published
    assert PUBLISHED["resnet50"].endswith("ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051/resnet50.pth")
    state = load("resnet50").state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in published.items())
    assert not torch.equal(load("resnet50", pretrained=False).conv1.weight, theirs.conv1.weight)


def test_weights_come_from_a_url_too(downloads: dict) -> None:
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18()
    downloads["https://example.org/a.pth"] = theirs.state_dict()
    network = load("resnet18", pretrained="https://example.org/a.pth")
    assert torch.equal(features_of(network), features_of(theirs))


def test_what_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, write_checkpoint: Callable, downloads: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(checkpoint, model={"backbone": "resnet18"})
    with pytest.raises(
        ModelError, match=r"^Nobody has published .* for resnet34; pass weights=FILE[^\n]*\.$"
    ):
        load("resnet34")
    with pytest.raises(
        ModelError, match=r"^The weights are those of a resnet18; load resnet18, not resnet34\.$"
    ):
        load("resnet34", weights=checkpoint)
    with pytest.raises(ModelError, match=r"not fit a resnet18 with other norm_layer: unexpected bn1\.weight"):
        load("resnet18", weights=checkpoint, norm_layer=torch.nn.Identity)
    with pytest.raises(ModelError, match=r"^Cannot read the weights .*absent\.pth: there is no such file"):
        load("resnet18", weights=tmp_path / "absent.pth")
    with pytest.raises(
        ModelError, match=r"^Cannot download https://example\.org/b\.pth \(.*no such host.*\)"
    ):
        load("resnet18", pretrained="https://example.org/b.pth")
    downloads["https://example.org/c.pth"] = {"a": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"c\.pth holds neither a checkpoint of fastbarlow nor a ResNet"):
        load("resnet18", pretrained="https://example.org/c.pth")

    def refuse(*arguments: object, **options: object) -> None:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL os.system")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    with pytest.raises(ModelError, match="which could run code"):
        load("resnet18", pretrained="https://example.org/d.pth")
