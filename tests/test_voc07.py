"""VOC 2007: average precisions and machines against plain definitions, the protocol against its steps."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from typer.testing import CliRunner

from eval.average_precision import eleven_point_average_precision, interpolated_average_precision
from eval.config import FeaturesConfig
from eval.svm import SvmSettings, fit_class, fit_classes
from eval.voc07 import GridPool, Voc07Config, voc07
from model.errors import ModelError
from pipelines.errors import DataError
from pipelines.source.voc import VOC_CLASSES
from tests.dataset_trees import write_voc
from tools.cli import app

FEATURES = FeaturesConfig(image_size=32, resize=36, batch_size=16, workers=0)
CONFIG = Voc07Config(costs=(0.1, 10), folds=2)
SETTINGS = SvmSettings(costs=(0.01, 1, 100), folds=3, positive_weight=2, max_iterations=2000, seed=0)


def precisions_and_recalls(positive: list[bool], scores: list[float]) -> list[tuple[float, float]]:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    points, found = [], 0
    for rank, i in enumerate(order, start=1):
        found += positive[i]
        points.append((found / rank, found / sum(positive)))
    return points


def area(positive: list[bool], scores: list[float]) -> float:
    points, total, last = precisions_and_recalls(positive, scores), 0.0, 0.0
    for _, recall in points:
        total += (recall - last) * max(p for p, r in points if r >= recall)
        last = recall
    return total


def eleven_points(positive: list[bool], scores: list[float]) -> float:
    points = precisions_and_recalls(positive, scores)
    return sum(max(p for p, r in points if r >= tenth / 10 - 1e-12) for tenth in range(11)) / 11


@pytest.mark.parametrize(("num", "share"), [(1, 1.0), (7, 0.5), (50, 0.1), (211, 0.3)])
def test_average_precisions_are_their_definitions(num: int, share: float) -> None:
    random = np.random.default_rng(num)
    for _ in range(5):
        positive = random.random(num) < share
        positive[random.integers(num)] = True
        scores = random.normal(size=num) + positive
        ranking = positive.tolist(), scores.tolist()
        assert interpolated_average_precision(positive, scores) == pytest.approx(area(*ranking), abs=1e-12)
        assert eleven_point_average_precision(positive, scores) == pytest.approx(
            eleven_points(*ranking), abs=1e-12
        )
        # Without interpolation it can only be less, and with many positives is not by much.
        plain = average_precision_score(positive, scores)
        assert (
            plain - 1e-12
            <= interpolated_average_precision(positive, scores)
            < plain + 0.3 * (num < 211) + 0.06
        )


def test_average_precisions_of_rankings_worked_out_by_hand() -> None:
    positive, scores = np.array([True, False, True, False]), np.array([4.0, 3.0, 2.0, 1.0])
    assert interpolated_average_precision(positive, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert eleven_point_average_precision(positive, scores) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert interpolated_average_precision(~positive, -scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of 60 samples, their presence with ten difficult ones, features to test on."""
    random = np.random.default_rng(seed)
    train, test = random.normal(size=(60, 7)), random.normal(size=(13, 7))
    presence = np.where(train[:, 0] + 0.7 * random.normal(size=60) > 0.5, 1, -1)
    presence[random.permutation(60)[:10]] = 0
    return train, presence, test


@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
def test_cost_and_machine_are_those_of_a_plain_cross_validation() -> None:
    train, presence, test = problem()
    kept, labels = train[presence != 0], presence[presence != 0]

    def machine(cost: float) -> LinearSVC:
        return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)

    means = []
    for cost in SETTINGS.costs:
        of_folds = []
        for learn, held_out in StratifiedKFold(3).split(kept, labels):
            scores = machine(cost).fit(kept[learn], labels[learn]).decision_function(kept[held_out])
            of_folds.append(average_precision_score(labels[held_out] == 1, scores))
        means.append(np.mean(of_folds))
    best = SETTINGS.costs[int(np.argmax(means))]
    found = fit_class(train, presence, test, SETTINGS)
    assert (found.cost, found.held_out_precision) == (best, pytest.approx(max(means), abs=1e-12))
    assert found.scores_M.tolist() == machine(best).fit(kept, labels).decision_function(test).tolist()


def test_difficult_images_of_a_class_teach_it_nothing_and_other_classes_something() -> None:
    train, presence, test = problem()
    spoiled = train.copy()
    spoiled[presence == 0] = 1e3
    both = np.stack([presence, np.where(presence == 0, 1, -1)], axis=1)
    calls: list[tuple[int, int]] = []
    plain, other = (
        fit_classes(x, both, test, SETTINGS, 1, lambda *call: calls.append(call)) for x in (train, spoiled)
    )
    assert plain[0].scores_M.tolist() == other[0].scores_M.tolist()
    assert plain[1].scores_M.tolist() != other[1].scores_M.tolist()
    assert calls == [(1, 2), (2, 2)] * 2


def test_fits_that_do_not_converge_are_counted() -> None:
    few = SvmSettings(costs=(1000,), folds=3, positive_weight=2, max_iterations=1, seed=0)
    assert fit_class(*problem(), few).unconverged == 4  # three folds and the last fit
    assert fit_class(*problem(), SETTINGS).unconverged < 4


def test_grid_is_the_published_pooling() -> None:
    map_NCHW = torch.randn(2, 5, 7, 7)
    assert torch.equal(GridPool(2)(map_NCHW), nn.AvgPool2d(6, stride=1)(map_NCHW))
    torch.testing.assert_close(GridPool(1)(map_NCHW), nn.AdaptiveAvgPool2d(1)(map_NCHW))
    with pytest.raises(ModelError, match=r"has 1 x 3 places, fewer than the grid of 2 x 2; .*--grid 1\.$"):
        GridPool(2)(map_NCHW[..., :1, :3])


class Pixels(nn.Module):
    """A backbone whose last map is its image at an eighth of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.avgpool(nn.functional.avg_pool2d(images_NCHW, 8)).flatten(1)


def draw_objects(count: int, first: int, seed: int) -> dict[str, list]:
    """Images with two objects each, a fifth of them difficult; every class is on some of them."""
    random = np.random.default_rng(seed)
    images = {}
    for number in range(count):
        kinds = VOC_CLASSES[number % 20], VOC_CLASSES[int(random.integers(20))]
        corners = random.integers(1, 25, (2, 2)).tolist()
        images[f"{first + number:06}"] = [
            (kind, number >= 40 and random.random() < 0.4, (x, y, x + 30, y + 30))
            for kind, (x, y) in zip(kinds, corners, strict=True)
        ]
    return images


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("VOCdevkit")
    write_voc(folder, {"trainval": draw_objects(60, 1, seed=1), "test": draw_objects(45, 1000, seed=2)})
    return folder


def plain_features(file: Path) -> np.ndarray:
    """Two resizes of PIL's, two by two windows, length 1."""
    image = Image.open(file)
    scale = 36 / min(image.size)
    image = image.resize([max(36, int(side * scale)) for side in image.size], Image.BILINEAR)
    pixels_HW3 = np.asarray(image.resize((32, 32), Image.BILINEAR), np.float32) / 255
    map_443 = pixels_HW3.reshape(4, 8, 4, 8, 3).mean(axis=(1, 3))
    map_443 = (map_443 - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    windows = [[map_443[y : y + 3, x : x + 3].mean(axis=(0, 1)) for x in (0, 1)] for y in (0, 1)]
    feature = np.array(windows).transpose(2, 0, 1).reshape(-1).astype(np.float64)
    return feature / (np.linalg.norm(feature) + 1e-5)


def test_protocol_is_its_steps(devkit: Path) -> None:
    calls: list[tuple[int, int]] = []
    backbone = Pixels()
    result, by_class = voc07(
        backbone, devkit, FEATURES, CONFIG, "cpu", lambda *call: calls.append(call), jobs=1
    )
    root = devkit / "VOC2007"
    features, presence = {}, {}
    for part in ("trainval", "test"):
        names = (root / f"ImageSets/Main/{part}.txt").read_text().split()
        features[part] = np.stack([plain_features(root / f"JPEGImages/{name}.jpg") for name in names])
        for kind in VOC_CLASSES:
            lines = (root / f"ImageSets/Main/{kind}_{part}.txt").read_text().splitlines()
            presence[part, kind] = np.array([int(line.split()[1]) for line in lines])
    settings = SvmSettings((0.1, 10), 2, 2, 2000, 0)
    means = [[], []]
    for kind in VOC_CLASSES:
        found = fit_class(features["trainval"], presence["trainval", kind], features["test"], settings)
        scored = presence["test", kind] != 0
        ranking = (presence["test", kind][scored] == 1).tolist(), found.scores_M[scored].tolist()
        means[0].append(area(*ranking))
        means[1].append(eleven_points(*ranking))
        assert by_class[kind].average_precision == pytest.approx(means[0][-1], abs=1e-9), kind
    assert any((values == 0).any() for values in presence.values())
    assert result.figures["mAP"] == pytest.approx(np.mean(means[0]), abs=1e-9)
    assert result.figures["mAP_11_point"] == pytest.approx(np.mean(means[1]), abs=1e-9)
    assert (105, 105) in calls and calls[-1] == (20, 20)
    assert [(data.images, data.classes) for data in result.data.values()] == [(60, 20), (45, 20)]
    assert isinstance(backbone.avgpool, nn.AdaptiveAvgPool2d)  # the caller's network stays as it is


def test_command_writes_figures_and_classes(devkit: Path, tmp_path: Path, write_checkpoint: Callable) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(
        checkpoint,
        model={"backbone": "resnet18"},
        eval={"features": FEATURES.model_dump()},
    )
    arguments = ["eval", "voc07", str(checkpoint), str(devkit), "--jobs", "1", "--json", "--device", "cpu"]
    arguments += ["--cost", "1", "--image-size", "24", "--folds", "2", "--grid", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["protocol"] == "voc07"
    assert 0 < record["figures"]["mAP"] <= 1
    assert list(record["classes"]) == list(VOC_CLASSES)
    assert record["settings"]["features"]["image_size"] == 24
    assert record["settings"]["voc07"]["costs"] == [1]
    assert record == json.loads((tmp_path / "eval" / "checkpoint-voc07-VOC2007.json").read_text())
    refused = CliRunner().invoke(app, [*arguments[:3], str(tmp_path)])
    assert refused.exit_code == 2 and "holds no folder VOC2007" in refused.output


def test_class_with_too_few_images_is_one_sentence(tmp_path: Path) -> None:
    write_voc(tmp_path, {"trainval": draw_objects(19, 1, seed=1), "test": draw_objects(20, 1000, seed=2)})
    with pytest.raises(DataError, match=r"^[^\n]* images of this part with the class \w+, and 2 [^\n]*\.$"):
        voc07(Pixels(), tmp_path, FEATURES, CONFIG, "cpu", jobs=1)
