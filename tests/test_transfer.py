"""Linear classifiers on other data sets: the published settings, and whole evaluations of miniatures."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner, Result

from eval.transfer import SETTINGS, TransferConfig, fit_and_test
from tests.dataset_trees import write_inat, write_places
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
        rates = [config.rate(epoch) for epoch in range(config.epochs)]
        assert rates[0] == config.lr
        for before, after in pairwise(rates):
            assert after == pytest.approx(before) or after == pytest.approx(before / 10)
        return [epoch for epoch in range(1, config.epochs) if rates[epoch] < rates[epoch - 1] / 2]

    assert drops(SETTINGS["places205"]) == [5, 9]
    assert drops(SETTINGS["inat18"]) == [28, 56]
    assert drops(TransferConfig(epochs=84, milestones=(24, 48, 72))) == [24, 48, 72]
    for config in (SETTINGS["places205"], SETTINGS["inat18"]):
        assert (config.lr, config.weight_decay, config.batch_size) == (0.01, 5e-4, 256)


@pytest.mark.parametrize("normalise", [True, False])
def test_classifier_is_a_plain_loop_with_the_settings(normalise: bool) -> None:
    """Momentum, weight decay and batch-norm written out, in float64."""
    random = torch.Generator().manual_seed(3)
    train, test = torch.randn(33, 5, generator=random), torch.randn(50, 5, generator=random)
    labels, test_labels = (torch.randint(7, (n,), generator=random) for n in (33, 50))
    config = TransferConfig(epochs=6, batch_size=8, lr=0.3, weight_decay=0.01, normalise=normalise, seed=4)

    random = torch.Generator().manual_seed(4)
    weight = torch.empty(7, 5).normal_(std=0.01, generator=random).double().requires_grad_()
    bias = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(5, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    decays = {weight: 0.01, bias: 0.01} | ({scale: 0.0, shift: 0.0} if normalise else {})
    momenta = {parameter: torch.zeros_like(parameter) for parameter in decays}
    mean, variance = torch.zeros(5).double(), torch.ones(5).double()
    for epoch in range(6):
        rate = 0.3 * (1, 1, 0.1, 0.1, 0.01, 0.01)[epoch]
        for rows in torch.randperm(33, generator=random).split(8)[:4]:  # the fifth is one sample
            x = train[rows].double()
            if normalise:
                mean = 0.9 * mean + 0.1 * x.mean(dim=0)
                variance = 0.9 * variance + 0.1 * x.var(dim=0)
                x = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt() * scale + shift
            loss = cross_entropy(x @ weight.T + bias, labels[rows])
            for parameter, gradient in zip(decays, torch.autograd.grad(loss, list(decays)), strict=True):
                with torch.no_grad():
                    gradient = gradient + decays[parameter] * parameter
                    momenta[parameter] = 0.9 * momenta[parameter] + gradient
                    parameter -= rate * (gradient + 0.9 * momenta[parameter])
    x = test.double()
    if normalise:
        x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
    order = (x @ weight.T + bias).argsort(dim=1, descending=True)
    right = order == test_labels[:, None]
    expected = {"top1": right[:, 0].sum().item() / 50, "top5": right[:, :5].any(dim=1).sum().item() / 50}
    found = fit_and_test(train, labels, test, test_labels, 7, config, CPU)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 < found["top1"] < found["top5"] < 1


def test_network_is_not_trained_along(checkpoint: Path, tmp_path: Path) -> None:
    from eval.config import FeaturesConfig
    from eval.transfer import transfer

    write_places(tmp_path)
    features = FeaturesConfig(image_size=32, resize=32, workers=0)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.BatchNorm1d(48))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    config = TransferConfig(epochs=30, batch_size=6)
    result = transfer("places205", backbone, tmp_path, features, config, "cpu")
    assert result.figures == {"top1": 1.0, "top5": 1.0}  # three classes of brightness
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
    assert (settings["epochs"], settings["lr"], settings["milestones"]) == (30, 0.1, [20])
    assert settings["augmentation"] == "none"


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
    result = bench_knn(300, 16, 20, [5, 20], CPU)
    assert result["seconds"] > 0
    assert result["queries_per_second"] == 20 / result["seconds"]
    assert result["tflop_per_second"] == pytest.approx(2 * 300 * 16 * 20 / result["seconds"] / 1e12)
    assert (result["features_mb"], result["features_in_a_mapped_file"]) == (0.0192, False)
    assert result["peak_memory_mb"] is None or result["peak_memory_mb"] >= 0
    with pytest.raises(ConfigError, match="--k 301 is more than the 300 rows"):
        bench_knn(300, 16, 20, [301], CPU)
