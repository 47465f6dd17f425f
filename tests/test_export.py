"""Exported backbones: readable elsewhere, the same function here, never half a file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open

from model.errors import ModelError
from model.weights import load_backbone, read_weights
from tools.export import export_backbone


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_loads_the_pth_file_and_misses_only_the_classifier(
    tmp_path: Path, write_checkpoint: Callable, name: str
) -> None:
    twin = write_checkpoint(tmp_path / "checkpoint.pt", model={"backbone": name})
    export_backbone(tmp_path / "checkpoint.pt", tmp_path / "backbone.pth")
    theirs = getattr(torchvision.models, name)()
    keys = theirs.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert keys.unexpected_keys == []
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in twin.backbone.state_dict().items())


@pytest.mark.parametrize("small_stem", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_exported_file_gives_the_same_features(
    tmp_path: Path, write_checkpoint: Callable, suffix: str, small_stem: bool
) -> None:
    checkpoint, out = tmp_path / "checkpoint.pt", tmp_path / f"backbone{suffix}"
    write_checkpoint(checkpoint, model={"backbone": "resnet18", "small_stem": small_stem})
    export_backbone(checkpoint, out)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = load_backbone(checkpoint)(images)
        assert (features[0] != features[1]).float().mean() > 0.5  # a live network
        assert torch.equal(load_backbone(out)(images), features)
    assert {file.name for file in tmp_path.iterdir()} == {checkpoint.name, out.name}


def test_safetensors_file_says_what_it_holds(tmp_path: Path, write_checkpoint: Callable) -> None:
    checkpoint, out = tmp_path / "checkpoint.pt", tmp_path / "backbone.safetensors"
    augment = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    write_checkpoint(checkpoint, model={"backbone": "resnet18"}, data={"augment": augment})
    export_backbone(checkpoint, out)
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["backbone"]) == ("pt", "resnet18")
    assert json.loads(metadata["small_stem"]) is False
    assert read_weights(out).normalisation == read_weights(checkpoint).normalisation


def test_pth_file_is_refused_where_it_would_lose_the_normalisation(
    tmp_path: Path, write_checkpoint: Callable
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(checkpoint, model={"backbone": "resnet18"}, data={"augment": {"mean": (0.1, 0.2, 0.3)}})
    with pytest.raises(ModelError, match=r"export to \.safetensors"):
        export_backbone(checkpoint, tmp_path / "backbone.pth")
    assert not (tmp_path / "backbone.pth").exists()


def test_unknown_suffix_and_unwritable_folder_are_one_sentence(
    tmp_path: Path, write_checkpoint: Callable
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(checkpoint, model={"backbone": "resnet18"})
    with pytest.raises(ModelError, match=r"must end in \.pth or \.safetensors"):
        export_backbone(checkpoint, tmp_path / "backbone.onnx")
    with pytest.raises(ModelError, match=r"Cannot write .*absent/backbone\.pth: No such file or directory"):
        export_backbone(checkpoint, tmp_path / "absent" / "backbone.pth")


def test_target_below_a_file_is_one_sentence(tmp_path: Path, write_checkpoint: Callable) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(checkpoint, model={"backbone": "resnet18"})
    with pytest.raises(
        ModelError, match=r"^Cannot write .*checkpoint\.pt/x\.pth: Not a directory; [^\n]*\.$"
    ):
        export_backbone(checkpoint, checkpoint / "x.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_failed_export_leaves_the_old_file(
    tmp_path: Path, write_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    checkpoint, out = tmp_path / "checkpoint.pt", tmp_path / f"backbone{suffix}"
    write_checkpoint(checkpoint, model={"backbone": "resnet18"})
    out.write_bytes(b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ModelError, match="No space left on device"):
        export_backbone(checkpoint, out)
    assert out.read_bytes() == b"old"
    assert {file.name for file in tmp_path.iterdir()} == {checkpoint.name, out.name}
