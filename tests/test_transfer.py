"""Linear classifiers on other data sets: the published settings, and whole evaluations of miniatures."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner, Result

from eval.classifier import Recipe
from eval.config import EvalConfig, FeaturesConfig, TransferConfig
from eval.run import evaluate
from eval.task import EvalTask
from eval.transfer import for_data_set, parts_of, transfer
from model.weights import IMAGENET
from pipelines.order import epoch_permutation
from pipelines.source import Source, open_source
from tests.dataset_trees import write_inat, write_places
from tools.bench.figures import figures_of
from tools.bench.knn import bench_knn
from tools.cli import app
from train.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    features = {"image_size": 32, "resize": 32, "batch_size": 16, "workers": 0}
    write_checkpoint(path, model={"backbone": "resnet18"}, eval={"features": features})
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", "transfer", *map(str, arguments), "--device", "cpu"])


def test_schedules_are_those_of_the_paper_and_of_vissl() -> None:
    def drops(config: TransferConfig) -> list[int]:
        recipe = Recipe(config.epochs, 256, 0.01, None, 0, 0, milestones=config.milestones)
        rates = [recipe.share_of_rate(epoch) for epoch in range(config.epochs)]
        assert rates[0] == 1
        for before, after in pairwise(rates):
            assert after == pytest.approx(before) or after == pytest.approx(before / 10)
        return [epoch for epoch in range(1, len(rates)) if rates[epoch] < rates[epoch - 1] / 2]

    config = TransferConfig()
    assert (config.lr, config.weight_decay, config.batch_size) == (0.01, 5e-4, 256)
    assert drops(for_data_set("places205", config)) == [5, 9]
    assert drops(for_data_set("inat18", config)) == [28, 56]
    assert drops(for_data_set("inat18", TransferConfig(milestones=(24, 48, 72)))) == [24, 48, 72]


class Uniform(Source):
    """Images of one colour each, which no crop changes."""

    path, classes, holds_raw = Path("uniform"), [*"abcdefg"], True

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.colours_N3 = random.integers(0, 256, (count, 3), dtype=np.uint8)
        self.labels_N = random.integers(0, 7, count)

    def __len__(self) -> int:
        return len(self.labels_N)

    def sizes(self, indices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(indices_K), 8, np.int32), np.full(len(indices_K), 8, np.int32)

    def pixels(self, index: int) -> np.ndarray:
        return np.broadcast_to(self.colours_N3[index], (8, 8, 3)).copy()

    def encoded(self, index: int) -> np.ndarray:
        raise NotImplementedError

    def name(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize("normalise", [True, False])
def test_classifier_is_a_plain_loop_with_the_settings(normalise: bool) -> None:
    """Momentum, weight decay and batch-norm written out, in float64."""
    train, test = Uniform(33, seed=3), Uniform(150, seed=4)
    config = TransferConfig(epochs=6, batch_size=8, lr=0.3, weight_decay=0.01, normalise=normalise, seed=4)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    features = FeaturesConfig(image_size=8, resize=8, workers=0)
    task = EvalTask(
        backbone, IMAGENET, train, test, EvalConfig(features=features), CPU, lambda done, total: None
    )

    def features_of(source: Uniform) -> Tensor:
        return (
            torch.from_numpy(source.colours_N3).double() / 255 - torch.tensor(IMAGENET.mean)
        ) / torch.tensor(IMAGENET.std)

    weight = torch.empty(7, 3).normal_(std=0.01, generator=torch.Generator().manual_seed(4)).double()
    weight.requires_grad_()
    bias = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    decays = {weight: 0.01, bias: 0.01} | ({scale: 0.0, shift: 0.0} if normalise else {})
    momenta = {parameter: torch.zeros_like(parameter) for parameter in decays}
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for epoch in range(6):
        rate = 0.3 * (1, 1, 0.1, 0.1, 0.01, 0.01)[epoch]
        order = epoch_permutation(33, 4, epoch)
        for rows in np.split(order, range(8, 33, 8))[: 4 if normalise else 5]:  # the fifth is one sample
            x = features_of(train)[rows]
            if normalise:
                mean = 0.9 * mean + 0.1 * x.mean(dim=0)
                variance = 0.9 * variance + 0.1 * x.var(dim=0)
                x = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt() * scale + shift
            loss = cross_entropy(x @ weight.T + bias, torch.from_numpy(train.labels_N[rows]))
            for parameter, gradient in zip(decays, torch.autograd.grad(loss, list(decays)), strict=True):
                with torch.no_grad():
                    gradient = gradient + decays[parameter] * parameter
                    momenta[parameter] = 0.9 * momenta[parameter] + gradient
                    parameter -= rate * (gradient + 0.9 * momenta[parameter])
    x = features_of(test)
    if normalise:
        x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
    order = (x @ weight.T + bias).argsort(dim=1, descending=True)
    right = order == torch.from_numpy(test.labels_N)[:, None]
    expected = {"top1": right[:, 0].sum().item() / 150, "top5": right[:, :5].any(dim=1).sum().item() / 150}
    found = transfer(task, for_data_set("folder", config))
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert 0 < found["top1"] < found["top5"] < 1


def test_network_is_not_trained_along(checkpoint: Path, tmp_path: Path) -> None:
    write_places(tmp_path)
    features = FeaturesConfig(image_size=32, resize=32, workers=0)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.BatchNorm1d(48))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    config = EvalConfig(features=features, transfer=TransferConfig(epochs=30, batch_size=6))
    parts = map(open_source, parts_of("places205", tmp_path))
    result = evaluate("transfer-places205", backbone, *parts, config, "cpu")
    assert result.figures["top1"] == 1  # three classes of brightness
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(("name", "write"), [("places205", write_places), ("inat18", write_inat)])
def test_published_layout_is_evaluated_by_the_command(
    checkpoint: Path, tmp_path: Path, name: str, write: Callable
) -> None:
    write(tmp_path / "data")
    out = tmp_path / "result.json"
    options = "--epochs", 30, "--lr", 0.1, "--milestone", 20, "--out", out, "--json"
    result = call(name, checkpoint, tmp_path / "data", *options)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads(out.read_text())
    assert record["protocol"] == f"transfer-{name}"
    assert record["figures"]["top1"] > 0.6
    sizes = {role: (part["images"], part["classes"]) for role, part in record["data"].items()}
    assert sizes == {"train": (12, 3), "test": (6, 3)}
    settings = record["settings"]["transfer"]
    assert record["settings"]["augmentation"] == "random crops"
    assert (settings["epochs"], settings["lr"], settings["milestones"]) == (30, 0.1, [20])


def test_any_image_folder_is_evaluated_by_the_command(
    checkpoint: Path, tmp_path: Path, write_images: Callable
) -> None:
    write_images(tmp_path / "train", ["a", "b"], per_class=6)
    write_images(tmp_path / "val", ["a", "b"], per_class=3, seed=1)
    assert call("folder", checkpoint, tmp_path, "--epochs", 2).exit_code == 0
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "c")
    refused = call("folder", checkpoint, tmp_path)
    assert refused.exit_code == 2 and "differ (only one has 'b')" in refused.output
    assert call("folder", checkpoint, tmp_path / "train").exit_code == 2  # no train/ in it
    for options in (("--lr", "nan"), ("--epochs", 0), ("--milestone", 0)):
        refused = call("folder", checkpoint, tmp_path, *options)
        assert refused.exit_code == 2 and "change the option." in refused.output, options


def test_bench_knn_measures_a_search() -> None:
    result = bench_knn(300, 16, 20, [5, 20], CPU, repeats=3)
    assert result["seconds"] == median(result["all_seconds"]) > 0
    (figure,) = figures_of(result)
    assert list(figure.values) == [20 / seconds for seconds in result["all_seconds"]]
    assert len(figure.values) == 3
    assert result["queries_per_second"] == 20 / result["seconds"]
    assert result["tflop_per_second"] == pytest.approx(2 * 300 * 16 * 20 / result["seconds"] / 1e12)
    assert (result["features_mb"], result["features_in_a_mapped_file"]) == (0.0192, False)
    assert result["peak_memory_mb"] is None or result["peak_memory_mb"] >= 0
    with pytest.raises(ConfigError, match="--k 301 is more than the 300 rows"):
        bench_knn(300, 16, 20, [301], CPU)
