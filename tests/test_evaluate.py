"""A whole evaluation: from a file of weights and two image folders to figures."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from eval.config import EvalConfig
from eval.features import extract_features
from eval.knn import knn_accuracy
from eval.run import PROTOCOLS, evaluate
from model.weights import IMAGENET, Normalisation, read_weights
from pipelines.errors import DataError
from pipelines.source import FolderSource

CONFIG = EvalConfig.model_validate(
    {
        "features": {"image_size": 32, "resize": 32, "batch_size": 16, "workers": 0},
        "knn": {"k": 5},
        "linear": {"epochs": 20, "batch_size": 8, "lr": 0.03},
    }
)
STATISTICS = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, write_images: Callable
) -> tuple[FolderSource, FolderSource]:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", ["a", "b", "c"], per_class=10, seed=1)
    write_images(folder / "test", ["a", "b", "c"], per_class=5, seed=2)
    return FolderSource(folder / "train"), FolderSource(folder / "test")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    model = {"backbone": "resnet18", "small_stem": True}
    write_checkpoint(path, model=model, data={"augment": STATISTICS._asdict()})
    return path


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_brightness_classes_are_told_apart_and_the_result_is_plain_data(
    checkpoint: Path, sources: tuple, protocol: str
) -> None:
    calls: list[tuple[int, int]] = []
    result = evaluate(protocol, checkpoint, *sources, CONFIG, "cpu", lambda *call: calls.append(call))
    assert result.figures["top1"] > 0.9
    assert [(data.images, data.classes) for data in result.data.values()] == [(30, 3), (15, 3)]
    assert result.settings == CONFIG.model_dump(mode="json", include={"features", protocol})
    assert json.loads(json.dumps(asdict(result)))["protocol"] == protocol
    assert calls == [(16, 45), (30, 45), (45, 45)]


def test_images_are_normalised_as_in_the_run(
    checkpoint: Path, sources: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Normalisation] = []

    def spy(*arguments: object, normalisation: Normalisation) -> tuple[torch.Tensor, torch.Tensor]:
        used.append(normalisation)
        return extract_features(*arguments, normalisation=normalisation)

    monkeypatch.setattr("eval.run.extract_features", spy)
    evaluate("knn", checkpoint, *sources, CONFIG, "cpu")
    assert used == [STATISTICS] * 2
    evaluate("knn", read_weights(checkpoint).build(), *sources, CONFIG, "cpu")
    assert used[2:] == [IMAGENET] * 2


def test_backbone_and_its_file_give_the_same_figure(checkpoint: Path, sources: tuple) -> None:
    backbone = read_weights(checkpoint).build()
    result = evaluate("knn", backbone, *sources, CONFIG, "cpu", normalisation=STATISTICS)
    assert result == evaluate("knn", checkpoint, *sources, CONFIG, "cpu")
    train, test = (
        extract_features(backbone, source, CONFIG.features, "cpu", normalisation=STATISTICS)
        for source in sources
    )
    assert result.figures == {"top1": knn_accuracy(*train, *test, CONFIG.knn)}


def test_checkpoint_keeps_the_eval_settings_of_its_run(tmp_path: Path, write_checkpoint: Callable) -> None:
    write_checkpoint(
        tmp_path / "checkpoint.pt", model={"backbone": "resnet18"}, eval=CONFIG.model_dump(mode="json")
    )
    weights = read_weights(tmp_path / "checkpoint.pt")
    assert EvalConfig.model_validate(weights.eval_settings) == CONFIG
    torch.save(weights.state, tmp_path / "backbone.pth")
    assert read_weights(tmp_path / "backbone.pth").eval_settings is None


def test_datasets_with_different_classes_are_one_sentence(
    checkpoint: Path, sources: tuple, tmp_path: Path, write_images: Callable
) -> None:
    write_images(tmp_path / "other", ["a", "b", "d"], per_class=1)
    with pytest.raises(DataError, match=r"The classes of .*train and .*other differ \(only one has 'c'\)"):
        evaluate("knn", checkpoint, sources[0], FolderSource(tmp_path / "other"), CONFIG, "cpu")


def test_a_dataset_without_labels_is_refused(checkpoint: Path, sources: tuple, monkeypatch) -> None:
    for source in sources:
        monkeypatch.setattr(source, "classes", [])
    with pytest.raises(DataError, match=r"train has no labels; evaluate on .*\.$"):
        evaluate("knn", checkpoint, *sources, CONFIG, "cpu")
