"""Exported networks: readable elsewhere, the same function there, never half a file.

Shape legend: N images, C colours (3), H and W pixels, F feature width, D embedding width.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from torch import Tensor

from model.errors import ModelError
from model.twin import Twin
from model.weights import IMAGENET, load_backbone, read_weights
from tools.export import FORMATS, Exported, export_backbone, export_twin
from tools.export import export as export_module
from tools.export.graph_files import load_onnx
from tools.export.network import build_encoder
from tools.export.verify import TOLERANCE
from tools.results import file_hash

PROGRAMS = ".onnx", ".pt2", ".ts"
SHAPES_NCHW = (1, 3, 32, 32), (5, 3, 33, 47), (2, 3, 96, 64)  # at the first the last feature map is one pixel


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable) -> tuple[Twin, Path]:
    """A twin in evaluation mode, and its checkpoint."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    return write_checkpoint(path, model={"backbone": "resnet18"}).eval(), path


@pytest.fixture(scope="module")
def programs(trained: tuple[Twin, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """That twin, whole, in every format that is a program."""
    folder = tmp_path_factory.mktemp("programs")
    return {suffix: export_twin(trained[1], folder / f"twin{suffix}") for suffix in PROGRAMS}


@pytest.fixture(scope="module")
def opened(programs: dict[str, Exported]) -> dict[str, tuple[Callable, dict[str, str]]]:
    """What each program does and its metadata, in terms of the library that is made for it alone."""
    import onnxruntime

    paths = {suffix: exported.path for suffix, exported in programs.items()}
    session = onnxruntime.InferenceSession(paths[".onnx"], providers=["CPUExecutionProvider"])
    of_trace, of_program = {"metadata.json": ""}, {"metadata.json": ""}
    return {
        ".onnx": (
            lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()}))),
            session.get_modelmeta().custom_metadata_map,
        ),
        ".pt2": (
            torch.export.load(paths[".pt2"], extra_files=of_program).module(),
            json.loads(of_program["metadata.json"]),
        ),
        ".ts": (torch.jit.load(paths[".ts"], _extra_files=of_trace), json.loads(of_trace["metadata.json"])),
    }


def expect(twin: Twin, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, F) and embeddings (N, D)."""
    features_NF = twin.backbone(images_NCHW)
    return features_NF, twin.projector(features_NF)


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_program_gives_features_and_embeddings_of_images_of_any_number_and_size(
    trained: tuple[Twin, Path], opened: dict[str, tuple], suffix: str
) -> None:
    run, metadata = opened[suffix]
    assert (metadata["backbone"], metadata["projector"]) == ("resnet18", "8-8")
    assert json.loads(metadata["mean"]) == list(IMAGENET.mean)
    assert json.loads(metadata["std"]) == list(IMAGENET.std)
    generator = torch.Generator().manual_seed(2)
    for shape in SHAPES_NCHW:
        images_NCHW = torch.randn(shape, generator=generator)
        with torch.inference_mode():
            expected, found = expect(trained[0], images_NCHW), run(images_NCHW)
        assert [tuple(x.shape) for x in found] == [(shape[0], 512), (shape[0], 8)]
        for x, y in zip(expected, found, strict=True):
            assert (x - y).abs().max() <= 1e-5 * x.abs().max()
            assert x.abs().max() > 0.01  # a live network


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_report_of_an_export_is_true(
    trained: tuple[Twin, Path], programs: dict[str, Exported], suffix: str
) -> None:
    exported = programs[suffix]
    assert exported.sha256 == file_hash(exported.path)
    assert exported.bytes == exported.path.stat().st_size
    assert exported.checkpoint_sha256 == file_hash(trained[1])
    assert 0 <= exported.difference <= TOLERANCE
    library = {".onnx": "onnxruntime", ".pt2": "torch.export", ".ts": "torch.jit"}[suffix]
    assert exported.reader.startswith(library)


def test_onnx_names_its_dimensions(programs: dict[str, Exported]) -> None:
    import onnx

    model = onnx.load(programs[".onnx"].path)
    ports = [*model.graph.input, *model.graph.output]
    dims = [[d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim] for port in ports]
    assert [port.name for port in ports] == ["images", "features", "embeddings"]
    assert dims == [["batch", 3, "height", "width"], ["batch", 512], ["batch", 8]]


def test_onnx_is_read_back_without_onnxruntime_too(
    trained: tuple[Twin, Path], programs: dict[str, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    loaded = load_onnx(programs[".onnx"].path)
    assert loaded.reader.startswith("the reference evaluator of onnx")
    images_NCHW = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        for x, y in zip(expect(trained[0], images_NCHW), loaded.network(images_NCHW), strict=True):
            assert (x - y).abs().max() <= 1e-5 * x.abs().max()


def test_backbone_alone_is_a_program_of_one_output(trained: tuple[Twin, Path], tmp_path: Path) -> None:
    export_backbone(trained[1], tmp_path / "backbone.torchscript")
    (features_NF,) = torch.jit.load(tmp_path / "backbone.torchscript")(torch.zeros(1, 3, 32, 32))
    with torch.inference_mode():
        assert torch.equal(features_NF, trained[0].backbone(torch.zeros(1, 3, 32, 32)))


def test_onnx_that_cannot_be_written_is_one_sentence(
    trained: tuple[Twin, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "twin.onnx"
    with monkeypatch.context() as patch:
        patch.setattr("tools.export.graph_files.PROTOBUF_BYTES", 1000)
        with pytest.raises(ModelError, match=r"takes 0\.0 GiB, .* holds no more than 2; leave out [^\n]*\.$"):
            export_twin(trained[1], out)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"the Python package onnx and onnxscript; install fastbarlow\[onnx\]"
    ):
        export_twin(trained[1], out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["a weight", "not finite", "another number of outputs"])
def test_file_with_other_outputs_does_not_take_its_name(
    trained: tuple[Twin, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = tmp_path / "backbone.safetensors"
    out.write_bytes(b"old")

    def load(path: Path) -> object:
        loaded = FORMATS[".pth"].load(path)
        encoder = loaded.network
        if change == "a weight":
            encoder.backbone.layer4[1].bn2.bias.data[3] += 1e-3
        elif change == "not finite":
            encoder.backbone.layer4[1].bn2.bias.data[3] = float("nan")
        else:
            encoder.projector = torch.nn.Identity()
        return loaded

    monkeypatch.setitem(FORMATS, ".safetensors", FORMATS[".safetensors"]._replace(load=load))
    with pytest.raises(ModelError, match=r"^Cannot export to .*outputs .* nothing is written, [^\n]*\.$"):
        export_backbone(trained[1], out)
    assert out.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == [out.name]


def test_checkpoint_that_a_run_replaces_meanwhile_is_refused(
    trained: tuple[Twin, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(trained[1].read_bytes())
    read = export_module._read_backbone

    def replace_after(path: Path) -> object:
        weights = read(path)
        (tmp_path / "new").write_bytes(b"of the next step")
        (tmp_path / "new").replace(path)
        return weights

    monkeypatch.setattr(export_module, "_read_backbone", replace_after)
    with pytest.raises(ModelError, match=r"was replaced while it was read; export again\.$"):
        export_backbone(checkpoint, tmp_path / "backbone.pth")
    assert not (tmp_path / "backbone.pth").exists()


def test_checkpoint_is_not_overwritten_by_its_own_export(trained: tuple[Twin, Path], tmp_path: Path) -> None:
    first, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    export_backbone(trained[1], first)
    again.symlink_to(first)
    with pytest.raises(ModelError, match="to itself; choose another name"):
        export_backbone(first, again)


def test_small_stem_loads_into_torchvision_once_that_has_the_stem(
    tmp_path: Path, write_checkpoint: Callable
) -> None:
    twin = write_checkpoint(tmp_path / "checkpoint.pt", model={"backbone": "resnet18", "small_stem": True})
    exported = export_backbone(tmp_path / "checkpoint.pt", tmp_path / "backbone.pth")
    network = torchvision.models.resnet18()
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)
    with pytest.raises(RuntimeError, match=r"conv1\.weight"):
        network.load_state_dict(state, strict=False)
    network.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = torch.nn.Identity()
    assert network.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    network.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(network.eval()(images), twin.eval().backbone(images))
        assert torch.equal(build_encoder(exported.weights)(images)[0], network(images))


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
    with pytest.raises(ModelError, match=r"must end in \.pth, \.safetensors, \.onnx, .* or \.pt2\.$"):
        export_backbone(checkpoint, tmp_path / "backbone.h5")
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
