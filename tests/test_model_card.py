"""Model cards say what is known of an export, by the run that made it, and of the rest that it is unknown."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from typer.testing import CliRunner

from eval.result import DataSummary, EvalResult
from model.backbones import build_backbone
from model.twin_weights import TwinWeights
from model.weights import IMAGENET, BackboneWeights
from tools.cli import app
from tools.convert import convert
from tools.convert.manifest import load_manifest, save_manifest
from tools.export import Exported
from tools.model_card import OwnerTexts, read_owner_texts, write_card
from tools.results import default_place, file_hash, result_record, write_record
from train.config import RunConfig, save_config
from train.errors import TrainingError

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["ant", "bee"]
PER_CLASS, BATCH, STEP = 5, 4, 3  # 2 steps in an epoch of 10 images
CPU = torch.device("cpu")
REPORTS = [
    {"step": 1, "epoch": 0, "loss": 9.0, "pairs_per_second": 10.0, "seconds": 60.0, "skipped_steps": 0},
    {"step": 2, "epoch": 0, "loss": 7.0, "pairs_per_second": 30.0, "seconds": 1800.0, "skipped_steps": 2},
    {"step": 3, "epoch": 1, "loss": 5.5, "pairs_per_second": 20.0, "seconds": 900.0, "skipped_steps": 1},
    {"step": 4, "epoch": 1, "loss": 0.125, "pairs_per_second": 99.0, "seconds": 999.0, "skipped_steps": 9},
]
PROBES = {2: 0.25, 3: 0.375, 4: 0.999}  # by step


@pytest.fixture(scope="module")
def backbone() -> BackboneWeights:
    return BackboneWeights("resnet18", False, IMAGENET, build_backbone("resnet18").state_dict())


@dataclass
class Run:
    """A run's folder with everything that a card draws on; of the checkpoint itself only its bytes count."""

    folder: Path
    config: RunConfig
    backbone: BackboneWeights
    step: int = STEP
    num_samples: int = PER_CLASS * len(CLASSES)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def card(
        self,
        out: Path,
        *,
        is_known: bool = True,
        settings: dict[str, Any] | None = None,
        widths: str | None = None,
        owner: OwnerTexts | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        """The card beside a file `out` that was exported just now, see `card_of`."""
        out.write_text(f"{out.name} {widths} from {self.checkpoint.read_text()}")
        config = settings or self.config.model_dump(mode="json")
        content = {"config": config, "step": self.step, "num_samples": self.num_samples}
        weights = TwinWeights(self.backbone, None, widths, content if is_known else {})
        hashes = file_hash(out), out.stat().st_size, self.checkpoint, file_hash(self.checkpoint)
        write_card(Exported(out, *hashes, weights, 2e-7, "a reader"), owner or OwnerTexts())
        return card_of(out)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, write_images: Callable) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    write_images(folder, CLASSES, PER_CLASS)
    return folder


@pytest.fixture(scope="module")
def dataset(images: Path) -> Path:
    convert(images, images.with_name("train.beton"), workers=1)
    return images.with_name("train.beton")


@pytest.fixture
def run(tmp_path: Path, dataset: Path, backbone: BackboneWeights) -> Run:
    """Of three steps, stopped after the first two and resumed; the log goes on to a fourth step."""
    folder = tmp_path / "run"
    folder.mkdir()
    sections = {
        "run_dir": folder,
        "model": {"backbone": "resnet18", "projector": "8-8", "loss": {"off_diagonal_weight": 0.0123}},
        "data": {"path": str(dataset), "image_size": 32},
        "train": {"batch_size": BATCH, "epochs": 4, "optim": {"warmup_epochs": 1}},
    }
    config = RunConfig.model_validate(sections)
    save_config(config, folder / "config.yaml")
    lines = [r | ({"probe_accuracy": PROBES[r["step"]]} if r["step"] in PROBES else {}) for r in REPORTS]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoint.pt").write_text("weights")
    return Run(folder, config, backbone)


def export(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    (sentence,) = result.stderr.splitlines()
    return sentence


def card_of(out: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Facts, front matter and text of the card beside an exported file."""
    text = out.with_suffix(".card.md").read_text()
    _, matter, body = text.split("---\n", 2)
    return json.loads(out.with_suffix(".card.json").read_text()), yaml.safe_load(matter), body


def check_front_matter(matter: dict[str, Any]) -> None:
    """What Hugging Face's specification of the metadata requires, and of which type."""
    assert isinstance(matter["license"], str) and isinstance(matter["library_name"], str)
    for key in ("tags", "datasets", "metrics"):
        assert all(isinstance(name, str) and name for name in matter[key])
    for model in matter.get("model-index", []):
        assert model["name"]
        for result in model["results"]:
            assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            assert re.fullmatch(r"[\w.-]+", result["dataset"]["type"])
            assert all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"])


def test_card_draws_on_checkpoint_dataset_log_and_evaluations(
    run: Run, images: Path, dataset: Path, tmp_path: Path
) -> None:
    figures = {"top1": 0.3125, "top5": 0.75}
    data = {"train": DataSummary("d/train.beton", 10, 2), "test": DataSummary("d/val set.beton", 7, 2)}
    ours = result_record(
        EvalResult("linear", {"epochs": 3, "features": {"resize": 9}}, data, figures),
        run.checkpoint,
        "resnet18",
        CPU,
    )
    write_record(ours, default_place(run.checkpoint, "linear", Path("val")))
    write_record(
        ours | {"checkpoint_sha256": "0" * 64, "protocol": "knn"}, run.folder / "eval" / "other.json"
    )
    out = tmp_path / "net.safetensors"
    card, matter, body = run.card(out)

    assert card["checkpoint"]["sha256"] == file_hash(run.checkpoint)
    assert (card["checkpoint"]["step"], card["checkpoint"]["total_steps"]) == (STEP, 8)
    assert [(file["file"], file["sha256"]) for file in card["files"]] == [(out.name, file_hash(out))]
    parameters = sum(p.numel() for p in torchvision.models.resnet18(num_classes=1).parameters()) - 513
    assert (card["model"]["parameters"], card["model"]["feature_dim"]) == (parameters, 512)
    assert card["settings"] == run.config.model_dump(mode="json")

    manifest = load_manifest(dataset)
    assert (card["data"]["images"], card["data"]["sha256"]) == (10, manifest.sha256)
    assert card["data"]["source"] == str(images) and card["data"]["classes"] == CLASSES
    assert card["data"]["images_per_class"] == [PER_CLASS, PER_CLASS]

    training = card["training"]
    assert training["last"] == {"step": 3, "epoch": 1, "loss": 5.5}
    assert (training["pairs_per_second"], training["hours"]) == (20.0, (1800 + 900) / 3600)
    assert (training["skipped_steps"], training["starts"], training["reports"]) == (2 + 1, 2, 3)
    assert training["probe_accuracy"] == [[2, 0.25], [3, 0.375]] and training["knn_accuracy"] == []
    assert training["log_sha256"] == file_hash(run.folder / "metrics.jsonl")

    assert card["evaluations"] == [ours]
    check_front_matter(matter)
    (result,) = matter["model-index"][0]["results"]
    assert result["dataset"] == {
        "type": "val-set.beton",
        "name": "val set.beton",
        "args": {"images": 7, "classes": 2},
    }
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.3125), ("accuracy", 0.75)]
    assert matter["metrics"] == ["accuracy"] and "barlow-twins" in matter["tags"]

    for text in (
        *(
            "sum of C_ij^2 for i != j | 0.0123 |",
            "| steps | 3 of 8 (1.5 epochs) |",
            "| last report: loss | 5.5 |",
        ),
        *("top1 31.25%, top5 75.00%", "d/val set.beton (7 images, 2 classes)", "epochs 3, features.resize 9"),
        *("25.0% (step 2), 37.5% (step 3)", "| blur_p | 1.0 | 0.1 |", "Training was not at its end"),
        *("nearest neighbours on frozen features: not evaluated", "VOC07+12: not evaluated"),
        *("kNN while training | not evaluated", "hardware | unknown", "Licence of the weights: unknown"),
        *(manifest.sha256, file_hash(out), file_hash(run.checkpoint)),
    ):
        assert text in body, text
    assert "linear classifier on frozen features: not evaluated" not in body
    assert "0.125" not in body and "99" not in re.sub(
        r"`\w{64}`", "", body
    )  # of the step after the checkpoint


def test_what_belongs_to_another_run_or_dataset_is_unknown(run: Run, tmp_path: Path) -> None:
    settings = run.config.model_dump(mode="json")
    save_config(RunConfig.model_validate(settings | {"seed": 5}), run.folder / "config.yaml")
    run.num_samples = 12
    card, _, body = run.card(tmp_path / "net.pth")
    assert card["training"] == {"why_unknown": "the config.yaml beside the checkpoint is another run's"}
    assert card["data"].keys() == {"path", "images", "why_unknown", "is_imagenet"}
    assert "is now that of another dataset, of 10 images" in body and "5.5" not in body

    (run.folder / "config.yaml").unlink()
    settings["data"]["path"] = str(tmp_path / "moved.beton")
    card, _, body = run.card(tmp_path / "net.pth", settings=settings)
    assert "no readable config.yaml" in card["training"]["why_unknown"]
    assert "no manifest lies with it" in body


def test_card_of_bare_weights_claims_nothing(run: Run, tmp_path: Path) -> None:
    """They may be anybody's, trained by any method."""
    card, matter, body = run.card(tmp_path / "net.safetensors", is_known=False)
    assert card["settings"] is None and card["checkpoint"]["step"] is None
    check_front_matter(matter)
    assert matter["tags"] == ["resnet18"] and "model-index" not in matter and matter["license"] == "unknown"
    assert "How it was trained is unknown" in body and "Barlow Twins" not in body
    assert "## Distortions\n\nUnknown." in body
    assert "course of the training are unknown: the file does not say which run wrote it." in body
    assert "No checkpoint of the run from before it" in body


def test_owners_words_are_merged_and_checked(run: Run, tmp_path: Path) -> None:
    words = {
        "owner": "A. Owner",
        "contact": "owner@example.org",
        "licence": "Our Own Terms 1.2",
        "intended_use": "Sorting beetles.",
        "disallowed_use": "Sorting people.",
        "datasets": ["example/imagenet-beetles"],
        "hardware": "two abacuses",
    }
    about, out = tmp_path / "about.yaml", tmp_path / "net.pth"
    about.write_text(yaml.safe_dump(words))
    card, matter, body = run.card(out, owner=read_owner_texts(about))
    assert card["owner"] == words
    assert all(text in body for text in words.values() if isinstance(text, str))
    assert "The owner has stated nothing" not in body
    assert (matter["license"], matter["license_name"]) == ("other", "our-own-terms-1.2")
    assert matter["datasets"] == words["datasets"]
    assert "It learned from ImageNet." in body  # by what the owner says

    out.unlink()
    for content, sentence in (
        ("license: mit\n", f"{about}: unknown key 'license'; the nearest known key is 'licence'."),
        ("zz: 1\n", f"{about}: unknown key 'zz'; the keys are owner, contact, licence, intended_use, "),
        ("owner: a\nowner: b\n", f"{about} is not valid YAML: the key 'owner' comes twice at line 2"),
        ("- a\n", f"{about} must be a YAML mapping with the keys owner, contact"),
        ("owner: 3\n", f"{about}: owner: Input should be a valid string, but it is 3."),
    ):
        about.write_text(content)
        assert refuse(run.checkpoint, out, "--card", about).startswith(sentence)
    assert "No such file" in refuse(run.checkpoint, out, "--card", tmp_path / "absent.yaml")
    assert not out.exists()


def test_card_says_how_to_go_back(run: Run, tmp_path: Path) -> None:
    """To the run's checkpoint before, and to what had the name of the export before."""
    out, first = tmp_path / "net.pth", file_hash(run.checkpoint)
    card, _, body = run.card(out)
    first_export = file_hash(out)
    assert card["previous_checkpoint"] is card["replaced"] is None and "no other export" in body

    previous = run.folder / "checkpoint.previous.pt"
    run.checkpoint.rename(previous)
    run.checkpoint.write_text("better weights")
    for _ in range(2):  # again from the same checkpoint
        card, _, body = run.card(out)
        assert card["previous_checkpoint"] == {"path": str(previous), "sha256": first}
        assert card["replaced"]["checkpoint"]["sha256"] == first != file_hash(run.checkpoint)
        assert [file["sha256"] for file in card["replaced"]["files"]] == [first_export]
        assert first in body and first_export[:12] in body


def test_one_card_is_for_all_files_of_the_same_checkpoint(run: Run, tmp_path: Path) -> None:
    names = ["net.pth", "net.safetensors", "net.ts"]
    for name in names:
        card, _, body = run.card(tmp_path / name)
    assert [file["file"] for file in card["files"]] == names
    assert all(file["sha256"] == file_hash(tmp_path / file["file"]) in body for file in card["files"])
    assert all(file["sha256"] in body and f"`{file['file']}`" in body for file in card["files"])
    (tmp_path / "net.pth").write_text("something else")
    card, _, body = run.card(tmp_path / "net.ts", widths="8-8")
    assert [(file["file"], file["projector"]) for file in card["files"]] == [
        (names[1], None),
        (names[2], "8-8"),
    ]
    for broken in ('{"format": 1, "files": [3]}', "[]", "{", '{"format": 1, "files": [], "checkpoint": 2}'):
        (tmp_path / "net.card.json").write_text(broken)
        card, _, _ = run.card(tmp_path / "net.ts")
        assert len(card["files"]) == 1 and card["replaced"] is None


def test_card_that_cannot_be_written_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "net.card.md").mkdir()
    with pytest.raises(TrainingError, match=r"net\.pth is written, but its model card .* is not: [^\n]*\.$"):
        run.card(tmp_path / "net.pth")


def test_code_in_the_card_of_an_export_works(
    tmp_path: Path, write_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = {"backbone": "resnet18", "small_stem": True}  # which torchvision's network lacks
    twin = write_checkpoint(Path("checkpoint.pt"), model=model).eval()
    printed = export("checkpoint.pt", "net.pth")
    assert "its outputs are the checkpoint's to the bit" in printed and "net.card.md" in printed
    assert "give it one" in printed
    (line,) = export("checkpoint.pt", "net.safetensors", "--json").splitlines()
    result = json.loads(line)
    assert result["sha256"] == file_hash(Path("net.safetensors")) and result["difference"] == 0
    assert Path(result["card"]).exists() and Path(result["card_json"]).exists()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    blocks = re.findall(r"```python\n(.*?)```", card_of(Path("net.pth"))[2], re.DOTALL)
    assert len(blocks) == 2
    names = {"torch": torch, "torchvision": torchvision, "safetensors": safetensors, "CHECKOUT": str(ROOT)}
    with torch.inference_mode():
        expected = twin.backbone(images)
        for block in blocks:
            found = {**names, "images": images}
            exec(block, found)
            found["network"].fc = torch.nn.Identity()
            assert torch.equal(found["network"].eval()(images), expected)
            assert torch.equal(found.get("features", expected), expected)
        assert torch.equal(found["tensors"]["conv1.weight"], twin.backbone.conv1.weight)


def test_imagenet_is_known_by_the_names_of_its_classes(run: Run, dataset: Path, tmp_path: Path) -> None:
    manifest = load_manifest(dataset).model_copy(update={"classes": ("n01440764", "n01443537")})
    save_manifest(manifest, tmp_path / "train.manifest.json")
    settings = run.config.model_dump(mode="json")
    settings["data"]["path"], run.step = str(tmp_path / "train.beton"), 0
    card, _, body = run.card(tmp_path / "net.safetensors", settings=settings)
    assert card["data"]["is_imagenet"] and "Its pictures were collected from the web" in body
    assert "It has not been trained: no step has been done." in body
