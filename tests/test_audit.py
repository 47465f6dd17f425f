"""`fastbarlow audit`: one page and one file that say what was found and what could not be looked for."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from typer.testing import CliRunner, Result

from eval.audit.config import AuditConfig
from eval.audit.distortions import DISTORTIONS
from eval.audit.invariance import measure_invariance
from eval.audit.leaks import read_out
from eval.audit.run import Audit, audit
from eval.audit.sample import Encoder
from eval.config import FeaturesConfig
from eval.features import extract_features
from model.weights import IMAGENET, read_weights
from pipelines.source import FolderSource, Source
from tools.audit_page import audit_page
from tools.audit_record import audit_record
from tools.cli import app
from tools.results import file_hash

SIZE = 16
FEATURES = FeaturesConfig(image_size=SIZE, resize=SIZE, workers=0)
CONFIG = AuditConfig(images=24, distorted_images=2, folds=2, shuffles=1)
OPTIONS = ["--image-size", SIZE, "--resize", SIZE, "--workers", 0, "--batch-size", 32, "--json"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def encoder() -> Encoder:
    """A small one, with random weights that are always the same."""
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten())
    random = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, generator=random)
    return Encoder(backbone, IMAGENET, FEATURES)


def look(source: Source, **more: Encoder) -> Audit:
    """A short audit, without the command."""
    bars = lambda _: nullcontext(lambda *_: None)  # noqa: E731
    return audit(encoder(), source, CONFIG, torch.device("cpu"), bars, **more)


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, write_images: Callable, write_checkpoint: Callable
) -> Path:
    """images/ of three classes by brightness, attributes.csv, a checkpoint, and one with other weights."""
    folder = tmp_path_factory.mktemp("audit")
    write_images(folder / "images", ["ant", "bee", "cat"], per_class=12, seed=5)
    rows = [f"{i},{'left' if i % 2 else 'right'},{i // 12}" for i in range(36)]
    (folder / "attributes.csv").write_text("\n".join(["name,side,shade", *rows]))
    model = {"backbone": "resnet18"}
    twin = write_checkpoint(folder / "new.pt", model=model)
    torch.manual_seed(1)
    other = {
        name.removeprefix("backbone."): tensor + 0.3 * tensor.std() * torch.randn_like(tensor)
        if tensor.dim() == 4
        else tensor
        for name, tensor in twin.state_dict().items()
        if name.startswith("backbone.")
    }
    torch.save(other, folder / "old.pth")
    return folder


@pytest.fixture(scope="module")
def record(place: Path) -> dict:
    """Of an audit with everything, but fewer probes and distortions than the command's, for their time."""
    paths = place / "new.pt", place / "images"
    more = ["--against", place / "old.pth", "--attributes", place / "attributes.csv", "--out", place / "out"]
    few = {"folds": CONFIG.folds, "shuffles": CONFIG.shuffles}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.audit.run.read_out", lambda *of, **how: read_out(*of, **how | few))
        patch.setattr(
            "eval.audit.run.measure_invariance", partial(measure_invariance, distortions=DISTORTIONS[:3])
        )
        result = call("audit", *paths, *more, "--images", 30, *OPTIONS)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_record_says_with_what_it_was_measured(place: Path, record: dict) -> None:
    assert record == json.loads((place / "out" / "audit.json").read_text())
    assert record["checkpoint_sha256"] == file_hash(place / "new.pt")
    assert record["against_sha256"] == file_hash(place / "old.pth")
    assert record["data"]["images"] == 36 and record["data"]["looked_at"] == 30
    assert record["settings"]["features"]["image_size"] == SIZE and record["settings"]["audit"]["seed"] == 0
    assert {"torch", "processor"} <= record["environment"].keys()


def test_figures_are_those_of_the_features(place: Path, record: dict) -> None:
    """Recomputed from the dataset and the file of weights for the very images that were drawn."""
    source, weights = FolderSource(place / "images"), read_weights(place / "new.pt")
    features, labels = extract_features(
        weights.build(), source, FEATURES, "cpu", normalisation=weights.normalisation
    )
    drawn = torch.randperm(36, generator=torch.Generator().manual_seed(0))[:30].sort().values
    features, labels = normalize(features[drawn].double()), labels[drawn]
    cosines = (features @ features.T).fill_diagonal_(-1)
    nearest = cosines.topk(20)
    votes = torch.zeros(30, 3, dtype=torch.float64)
    votes.scatter_add_(1, labels[nearest.indices], (nearest.values / 0.07).exp())
    right = votes.argmax(1) == labels
    assert record["accuracy"]["accuracy"] == pytest.approx(right.double().mean().item())
    for label, group in enumerate(record["classes"]):
        assert group["name"] == source.classes[label] and group["images"] == (labels == label).sum()
        assert group["accuracy"] == pytest.approx(right[labels == label].double().mean().item())
        assert group["too_small"]
    sides = {group["name"]: group for group in record["subgroups"]["side"]}
    assert sides["left"]["images"] == (drawn % 2 == 1).sum()
    assert sides["left"]["accuracy"] == pytest.approx(right[drawn % 2 == 1].double().mean().item())
    for entry in record["neighbours"]["by_class"]:
        at = drawn.tolist().index(entry["query"])
        assert entry["similarities"] == pytest.approx(nearest.values[at, :10].tolist(), abs=1e-5)
        assert entry["class"] == source.classes[labels[at]]
    same = (labels[nearest.indices[:, :10]] == labels[:, None]).double().mean().item()
    assert record["neighbours"]["same_class_share"] == pytest.approx(same)
    assert len(record["dimensions"]["eigenvalues"]) == 512
    leaks = {leak["name"]: leak for leak in record["leaks"]}
    assert {"side", "shade", "mean brightness"} <= leaks.keys()
    assert leaks["shade"]["leaks"] and not leaks["side"]["leaks"]  # classes differ by brightness alone
    assert record["drift"]["k"] == 10 and 0 < record["drift"]["overlap"] < 1
    assert record["may_be_silent"] is False and "may not be silent" in record["verdict"]


def test_the_page_needs_nothing_from_elsewhere_and_has_every_part(place: Path, record: dict) -> None:
    page = (place / "out" / "audit.html").read_text()
    assert page.count("<img ") == page.count('src="data:image/png;base64,')
    text = re.sub(r'base64,[^"]*', "", page)
    assert "http" not in text and "<script" not in text
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Nearest neighbours",
        *(["The worst neighbours"] if record["neighbours"]["worst"] else []),
        "Accuracy by class",
        "Accuracy by side",
        "Accuracy by shade",
        "Which distortions it ignores",
        "What can be read from the features",
        "Dead and redundant dimensions",
        "Drift against the other encoder",
        "What is not here",
        "Settings and versions",
    ]
    assert record["checkpoint_sha256"] in page and "too small" in page and "Bonferroni" in page


def test_an_encoder_may_replace_itself_without_a_word(place: Path) -> None:
    found = look(FolderSource(place / "images"), against=encoder())
    assert found.may_be_silent is True and found.drift.overlap == 1
    assert found.drift.cosine == pytest.approx(1) and found.drift.cka == pytest.approx(1)
    assert any("no file of attributes" in line for line in found.left_out)


def test_without_labels_the_parts_that_need_them_are_left_out_and_said(place: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((place / "images").rglob("*.jpg"))[:22]):
        shutil.copy(path, tmp_path / f"{number}.jpg")
    found = look(FolderSource(tmp_path))
    assert found.accuracy is None and found.classes == [] and found.worst is None
    assert found.drift is None and found.verdict is None
    assert any("no labels" in line for line in found.left_out)
    page = audit_page(found, CONFIG, "An audit", {})
    assert "Accuracy by class" not in page and "the images have no labels" in page
    assert audit_record(found, CONFIG, FEATURES)["neighbours"]["by_class"][0]["class"] is None


def test_the_seed_alone_fixes_what_is_found(place: Path) -> None:
    source = FolderSource(place / "images")
    first = audit_record(look(source), CONFIG, FEATURES)
    assert audit_record(look(source), CONFIG, FEATURES) == first


def test_what_is_wrong_is_one_sentence_before_the_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.audit.sample.extract_features", pytest.fail)
    (tmp_path / "file").touch()
    (tmp_path / "bad.csv").write_text("name,x\n99,1\n")
    start = ["audit", place / "new.pt", place / "images"]
    for options, sentence in (
        (["--out", tmp_path / "file"], "choose another place with --out"),
        (["--attributes", tmp_path / "bad.csv", "--out", tmp_path / "out"], "such as '99'"),
        (["--against", tmp_path / "file", "--out", tmp_path / "out"], "file"),
    ):
        result = call(*start, *options, *OPTIONS)
        assert result.exit_code == 2 and sentence in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1


def test_few_images_of_a_class_are_said_to_make_the_accuracy_too_low(place: Path) -> None:
    found = look(FolderSource(place / "images"))
    assert any("with 8.0 images of a class the 20 neighbours" in line for line in found.left_out)
