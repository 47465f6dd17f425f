"""A file of weights never runs code, whatever its format; every command refuses it in a sentence."""

import ast
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from model.errors import ModelError
from model.tensor_files import read_tensor_file
from model.weights import load_backbone
from tools.cli import app

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "pipelines", "model", "eval", "train", "tools"


class Payload:
    """Makes a file when it is unpickled by the book."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def as_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def as_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_bare_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))  # torch's reader knows no later one


def as_tar(content: Any, path: Path) -> None:
    """As torch 0.1 wrote it."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


FORMATS = [as_zip, as_legacy, as_bare_pickle, as_tar]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of one step on random pixels."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "run_dir": str(folder / "unused"),
                "data": {"path": "none", "loader": "synthetic", "image_size": 16},
                "model": {"backbone": "resnet18", "projector": "4-4"},
                "train": {"max_steps": 1, "batch_size": 4, "precision": "fp32", "device": "cpu"},
            }
        )
    )
    return folder / "run.yaml"


def refuse(*arguments: object) -> str:
    """The one sentence of a command that must fail."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    (sentence,) = result.stderr.splitlines()
    assert sentence.endswith(".") and "Traceback" not in result.output
    return sentence


def refusals(path: Path, recipe: Path) -> list[str]:
    """Of every command that takes a file of weights; `path` is a folder's checkpoint.pt, or another file."""
    out = path.with_name("out")
    sentences = [
        refuse("eval", "knn", path, "none", "none"),
        refuse("eval", "linear", path, "none", "none"),
        refuse("export", path, out / "x.pth"),
        refuse("export", path, out / "x.safetensors", "--with-projector"),
        refuse("pretrain", recipe, f"run_dir={out}", f"train.initial_weights={path}"),
    ]
    if path.name == "checkpoint.pt":
        sentences.append(refuse("pretrain", recipe, f"run_dir={path.parent}"))
    assert all(str(path) in sentence for sentence in sentences)
    return sentences


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.pth"])
@pytest.mark.parametrize("save", FORMATS)
def test_code_in_a_pickle_never_runs(save: Callable, name: str, recipe: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code has run"
    payload = Payload(marker)
    inside = {"epoch": 1, "config": {}, "model": {"backbone.conv1.weight": payload, "conv1.weight": payload}}
    save(inside, tmp_path / name)
    sentences = refusals(tmp_path / name, recipe)
    assert not marker.exists()
    if save is not as_tar:
        assert all("could run code" in sentence for sentence in sentences)
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()  # it was a payload


def test_objects_of_other_programs_are_told_as_such(tmp_path: Path) -> None:
    """As in the checkpoints of the authors' linear evaluation."""
    import argparse

    torch.save({"model": {}, "best_acc": argparse.Namespace(top1=0)}, tmp_path / "checkpoint.pth")
    with pytest.raises(ModelError, match="names more than tensors and plain data"):
        read_tensor_file(tmp_path / "checkpoint.pth")


def rewritten(source: Path, target: Path, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def test_archives_that_swell_are_refused(tmp_path: Path) -> None:
    plain, stored, bomb = (tmp_path / f"{name}.pth" for name in ("plain", "stored", "bomb"))
    torch.save({"conv1.weight": torch.zeros(10**6)}, plain)
    rewritten(plain, stored)
    assert read_tensor_file(stored).content["conv1.weight"].shape == (10**6,)  # only compression is refused
    rewritten(plain, bomb, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < plain.stat().st_size / 50
    with pytest.raises(ModelError, match="is damaged, cut short or no file of weights"):
        read_tensor_file(bomb)


def test_tensors_that_claim_more_than_there_is_are_refused(tmp_path: Path) -> None:
    """A length in the pickle, a storage in the old format, and a deep nest."""
    huge = b"\x8a\x06" + (2**40).to_bytes(6, "little")  # a number of six bytes, after its opcode
    for save in (as_zip, as_legacy):
        path = tmp_path / f"{save.__name__}.pth"
        save({"conv1.weight": torch.zeros(77)}, path)
        content = path.read_bytes()
        if save is as_zip:
            with zipfile.ZipFile(path) as archive:
                parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in parts.items():
                    archive.writestr(name, data.replace(b"KM", huge) if name.endswith(".pkl") else data)
            assert any(b"KM" in data for name, data in parts.items() if name.endswith(".pkl"))
        else:
            assert b"KM" in content
            path.write_bytes(content.replace(b"KM", huge))
        with pytest.raises(ModelError, match="is damaged"):
            load_backbone(path)
    (tmp_path / "deep.pth").write_bytes(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".")
    with pytest.raises(ModelError, match=r"is damaged|holds neither"):
        load_backbone(tmp_path / "deep.pth")


@pytest.mark.parametrize(
    "content",
    [
        (2**62).to_bytes(8, "little") + b"{}",
        (10**8 - 1).to_bytes(8, "little") + b"{}",
        (90).to_bytes(8, "little")
        + b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'.ljust(90),
        pickle.dumps(Payload(Path("code has run"))),
    ],
    ids=["giant header", "long header", "giant tensor", "pickle"],
)
def test_safetensors_that_lie_are_refused(content: bytes, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    refusals(tmp_path / "x.safetensors", recipe)
    assert not Path("code has run").exists()


@pytest.mark.parametrize(
    "metadata",
    [
        {"mean": "[" * 10**5},
        {"std": "[0, 0, 0]"},
        {"mean": '["a"]'},
        {"std": "{}"},
        {"mean": f"[1{400 * '0'}, 1, 1]"},
    ],
)
def test_metadata_that_lie_are_refused(metadata: dict, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ModelError, match="is damaged"):
        load_backbone(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "part", ["config", "model", "optimizer", "step", "mu", "shape", "probe", "weight", "scaler", "scale"]
)
def test_run_does_not_go_on_from_a_checkpoint_of_other_parts(
    part: str, recipe: Path, trained: Path, tmp_path: Path
) -> None:
    state = torch.load(trained, weights_only=True)
    last = list(state["model"])[-1]
    if part == "mu":
        state["optimizer"]["state"][0]["mu"] = torch.zeros(3)
    elif part == "shape":
        state["model"][last] = torch.zeros(3)
    elif part == "weight":
        state["probe"] = {"weight": 5}
    elif part == "scale":
        state["scaler"] = {**torch.amp.GradScaler("cpu").state_dict(), "scale": "x"}
    else:
        state[part] = {
            "config": [],
            "model": {last: 5},
            "optimizer": {"state": {}},
            "step": "x",
            "probe": [7],
            "scaler": {"scale": 1.0},
        }[part]
    torch.save(state, tmp_path / "checkpoint.pt")
    sentence = refuse("pretrain", recipe, f"run_dir={tmp_path}", "train.max_steps=2")
    assert str(tmp_path / "checkpoint.pt") in sentence and "start anew" in sentence


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    """The checkpoint of a run of one step."""
    result = CliRunner().invoke(app, ["pretrain", str(recipe), f"run_dir={recipe.with_name('run')}"])
    assert result.exit_code == 0, result.output
    return recipe.with_name("run") / "checkpoint.pt"


def test_only_one_place_takes_pickles_apart_and_none_runs_them() -> None:
    """`torch.load` with `weights_only=True`, in one file; of downloads torch's own, as strict, in another.

    Programs are loaded where they have just been written, to be compared with what they were made from.
    """
    found, programs, downloads = [], [], []
    for file in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, options = ast.unparse(node.func), {o.arg: ast.unparse(o.value) for o in node.keywords}
            assert options.get("allow_pickle", "False") == "False", file
            place = file.relative_to(ROOT).as_posix()
            if name in ("torch.jit.load", "torch.export.load"):
                programs.append(place)
            elif name.startswith("torch.hub."):
                assert (name, options["weights_only"]) == ("torch.hub.load_state_dict_from_url", "True"), file
                downloads.append(place)
            assert not name.startswith(("marshal.", "shelve.")), file
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec"), file
            if name == "yaml.load":
                assert ast.unparse(node.args[1]) == "_Loader", file  # a SafeLoader
            if name == "torch.load":
                assert options["weights_only"] == "True", file
                found.append(place)
    assert found == ["model/tensor_files.py"] and downloads == ["model/hub.py"]
    assert programs == ["tools/export/graph_files.py"] * 2
