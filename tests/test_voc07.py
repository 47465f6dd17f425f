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
from torch import nn
from typer.testing import CliRunner

from eval.average_precision import eleven_point_average_precision, interpolated_average_precision
from eval.run import VOC07, evaluate
from eval.svm import SvmSettings, fit_class, fit_classes
from eval.voc07 import GridPool
from model.errors import ModelError
from pipelines.errors import DataError
from pipelines.source import open_source
from pipelines.source.voc import VOC_CLASSES
from tests.dataset_trees import draw_voc_objects, write_voc
from tests.evaluations import VOC07_CONFIG, MemoryKeeper, Pixels, StoppedError, measure_voc07, stop_after
from tools.cli import app

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
    plain, other = (list(fit_classes(x, both, test, SETTINGS, 1)) for x in (train, spoiled))
    assert plain[0].scores_M.tolist() == other[0].scores_M.tolist()
    assert plain[1].scores_M.tolist() != other[1].scores_M.tolist()


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


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("VOCdevkit")
    write_voc(
        folder, {"trainval": draw_voc_objects(60, 1, seed=1), "test": draw_voc_objects(45, 1000, seed=2)}
    )
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
    result = measure_voc07(devkit, backbone, progress=lambda *call: calls.append(call))
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
        assert result.classes[kind]["average_precision"] == pytest.approx(means[0][-1], abs=1e-9), kind
    assert any((values == 0).any() for values in presence.values())
    assert result.figures["mAP"] == pytest.approx(np.mean(means[0]), abs=1e-9)
    assert result.figures["mAP_11_point"] == pytest.approx(np.mean(means[1]), abs=1e-9)
    assert (105, 105) in calls and calls[-1] == (20, 20)
    assert [(data.images, data.classes) for data in result.data.values()] == [(60, 20), (45, 20)]
    assert isinstance(backbone.avgpool, nn.AdaptiveAvgPool2d)  # the caller's network stays as it is


def test_a_stop_between_classes_costs_none_of_those_that_are_fitted(devkit: Path) -> None:
    keeper, calls = MemoryKeeper(), []
    with pytest.raises(StoppedError):
        measure_voc07(devkit, Pixels(), keeper=keeper, progress=stop_after(105 // 15 + 7))
    kept = [name for name in keeper.kept if name.startswith("class-")]
    assert 1 < len(kept) < 20
    result = measure_voc07(devkit, Pixels(), keeper=keeper, progress=lambda *call: calls.append(call))
    assert calls[-(20 - len(kept)) :] == [(done, 20) for done in range(len(kept) + 1, 21)]
    assert result == measure_voc07(devkit, Pixels())


def test_command_writes_figures_and_classes(devkit: Path, tmp_path: Path, write_checkpoint: Callable) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(
        checkpoint,
        model={"backbone": "resnet18"},
        eval={"features": VOC07_CONFIG.features.model_dump()},
    )
    arguments = ["eval", "voc07", str(checkpoint), str(devkit), "--workers", "0", "--json", "--device", "cpu"]
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
    write_voc(
        tmp_path, {"trainval": draw_voc_objects(19, 1, seed=1), "test": draw_voc_objects(20, 1000, seed=2)}
    )
    with pytest.raises(DataError, match=r"^[^\n]* images of this part with the class \w+, and 2 [^\n]*\.$"):
        measure_voc07(tmp_path, Pixels())


def test_images_of_another_kind_are_one_sentence(
    devkit: Path, tmp_path: Path, write_images: Callable
) -> None:
    write_images(tmp_path, ["a", "b"], per_class=2)
    voc, folder = open_source(Path(f"voc07:{devkit}")), open_source(tmp_path)
    with pytest.raises(DataError, match=r"is not PASCAL VOC 2007; "):
        evaluate(VOC07, Pixels(), voc, folder, VOC07_CONFIG, "cpu")
