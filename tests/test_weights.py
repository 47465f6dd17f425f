"""Backbones from files: the right weights under the right architecture, or one sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from model.backbones import BACKBONES, build_backbone
from model.errors import ModelError
from model.weights import IMAGENET, load_backbone, read_weights


def assert_same_function(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    theirs.eval()
    with torch.inference_mode():
        features = theirs(images)
        assert (features[0] != features[1]).float().mean() > 0.5  # a live network
        assert torch.equal(ours(images), features)


@pytest.mark.parametrize("small_stem", [False, True])
def test_checkpoint_gives_its_backbone_in_evaluation_mode(
    tmp_path: Path, write_checkpoint: Callable, small_stem: bool
) -> None:
    path = tmp_path / "checkpoint.pt"
    twin = write_checkpoint(path, model={"backbone": "resnet18", "small_stem": small_stem})
    backbone = load_backbone(path)
    assert not any(module.training for module in backbone.modules())
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert backbone.feature_dim == 512
    assert_same_function(backbone, twin.backbone)


def test_loading_draws_no_random_numbers(tmp_path: Path, write_checkpoint: Callable) -> None:
    write_checkpoint(tmp_path / "checkpoint.pt", model={"backbone": "resnet18"})
    before = torch.get_rng_state()
    load_backbone(tmp_path / "checkpoint.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_tell_what_the_run_was_trained_with(tmp_path: Path, write_checkpoint: Callable) -> None:
    path = tmp_path / "checkpoint.pt"
    augment = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    write_checkpoint(path, model={"backbone": "resnet18", "small_stem": True}, data={"augment": augment})
    weights = read_weights(path)
    assert (weights.name, weights.small_stem) == ("resnet18", True)
    assert weights.architecture == "resnet18 with the small stem"
    assert weights.normalisation == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("small_stem", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_architecture_is_found_from_the_tensors(tmp_path: Path, name: str, small_stem: bool) -> None:
    shapes = {k: v.shape for k, v in build_backbone(name, small_stem).state_dict().items()}
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}  # a few bytes per tensor
    torch.save(state, tmp_path / "backbone.pth")
    weights = read_weights(tmp_path / "backbone.pth")
    assert (weights.name, weights.small_stem, weights.normalisation) == (name, small_stem, IMAGENET)


def test_torchvisions_files_load_without_their_classifier_and_counters(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18()
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet18.pth")
    ours = load_backbone(tmp_path / "resnet18.pth")
    theirs.fc = torch.nn.Identity()
    assert_same_function(ours, theirs)


def test_half_precision_files_are_read_as_float32(tmp_path: Path) -> None:
    torch.save(build_backbone("resnet18").half().state_dict(), tmp_path / "half.pth")
    backbone = load_backbone(tmp_path / "half.pth")
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pth", "backbone.safetensors"])
def test_missing_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"Cannot read the weights .*{name}: there is no such file"):
        load_backbone(tmp_path / name)


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02]q\x00.", bytes(5000)])
def test_file_without_weights_is_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"^\S*{name} (is damaged|holds neither)[^\n]*\.$"):
        load_backbone(tmp_path / name)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_checkpoint_that_is_cut_short_is_one_sentence(
    tmp_path: Path, write_checkpoint: Callable, share: float
) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, model={"backbone": "resnet18"})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match="is damaged, cut short or no file of weights"):
        load_backbone(path)


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pth"])
def test_file_with_a_flipped_bit_is_one_sentence(
    tmp_path: Path, write_checkpoint: Callable, name: str
) -> None:
    path = tmp_path / name
    weight = write_checkpoint(path, model={"backbone": "resnet18"}).backbone.conv1.weight
    if path.suffix == ".pth":
        torch.save(build_backbone("resnet18").state_dict() | {"conv1.weight": weight.data}, path)
    content = bytearray(path.read_bytes())
    content[content.index(weight.detach().numpy().tobytes()[:64])] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is damaged, cut short or no file of weights"):
        load_backbone(path)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    state = build_backbone("resnet18").state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pth").state["conv1.weight"], state["conv1.weight"])


def test_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"conv1.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError):
        load_backbone(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


def test_checkpoint_whose_tensors_contradict_its_config_is_one_sentence(
    tmp_path: Path, write_checkpoint: Callable
) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, model={"backbone": "resnet18"})
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["model"]["backbone"] = "resnet34"
    torch.save(checkpoint, path)
    with pytest.raises(ModelError) as caught:
        load_backbone(path)
    # resnet34 has eight blocks more, each of two convolutions and two norms of four tensors: 80 tensors.
    assert "says resnet34" in str(caught.value)
    assert "missing layer1.2.conv1.weight, layer1.2.bn1.weight, layer1.2.bn1.bias and 77 more" in str(
        caught.value
    )

    checkpoint["config"]["model"]["backbone"] = "vgg16"
    torch.save(checkpoint, path)
    with pytest.raises(ModelError, match="names no known backbone"):
        load_backbone(path)


def test_other_networks_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    with torch.device("meta"):
        wide = torchvision.models.wide_resnet50_2().state_dict()
    torch.save({key: torch.zeros(()).expand(value.shape) for key, value in wide.items()}, path)
    with pytest.raises(ModelError, match=r"most like resnet50, .*of another shape layer1\.0\.conv1\.weight"):
        load_backbone(path)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ModelError, match="holds neither a checkpoint of fastbarlow nor a ResNet"):
        load_backbone(path)
