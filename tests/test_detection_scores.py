"""Figures of detectors: by VOC 2007's rules and by COCO's, against independent implementations of both."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.detection.coco_score import coco_figures, coco_results
from eval.detection.voc_score import THRESHOLDS_T, Detections, Truth, overlap, voc_figures
from pipelines.errors import DataError

NUM_CLASSES = 3
Scene = tuple[list[Truth], list[Detections]]


def draw_scene(seed: int, *, apart: bool, with_difficult: bool) -> Scene:
    """Objects of 11 images, and detections near most of them, some twice, some of a wrong class.

    If `apart`, no two objects of an image overlap, nor do detections reach another object than their own.
    """
    random = np.random.default_rng(seed)
    truths, found = [], []
    for count in random.integers(0, 7, 11):
        corners = random.uniform(0, 300, (count, 2))
        if apart:
            corners = np.stack([200.0 * np.arange(count), np.zeros(count)], axis=1)
        boxes = np.concatenate([corners, corners + random.uniform(30, 100, (count, 2))], axis=1)
        labels = random.integers(1, NUM_CLASSES + 1, count)
        difficult = random.random(count) < (0.3 if with_difficult else 0)
        truths.append(Truth(boxes, labels, difficult))
        chosen = random.integers(0, max(count, 1), 2 * count)
        if apart:  # a difficult object is found once: COCO counts a second time as wrong, VOC does not
            again = np.flatnonzero(~difficult)
            chosen = np.concatenate([np.arange(count), again])
        moved = boxes[chosen] + random.normal(0, 6, (len(chosen), 4))
        moved_labels = np.where(random.random(len(chosen)) < 0.85, labels[chosen], 1)
        scores = random.permutation(len(chosen)) + random.random()
        found.append(Detections(moved, moved_labels, scores / 100))
    return truths, found


def voc_by_the_book(truths: list[Truth], found: list[Detections], threshold: float) -> float:
    """The devkit's procedure for one threshold, object by object, with its own way to count pixels."""

    def inclusive(box: np.ndarray) -> np.ndarray:
        return np.array([box[0] + 1, box[1] + 1, box[2], box[3]])

    def common(a: np.ndarray, b: np.ndarray) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0]) + 1
        height = min(a[3], b[3]) - max(a[1], b[1]) + 1
        return max(width, 0) * max(height, 0)

    precisions = []
    for label in range(1, NUM_CLASSES + 1):
        lines = [
            (score, image, inclusive(box))
            for image, of_image in enumerate(found)
            for box, own, score in zip(of_image.boxes_D4, of_image.labels_D, of_image.scores_D, strict=True)
            if own == label
        ]
        objects = [
            [
                {"box": inclusive(box), "difficult": difficult, "taken": False}
                for box, own, difficult in zip(t.boxes_O4, t.labels_O, t.difficult_O, strict=True)
                if own == label
            ]
            for t in truths
        ]
        count = sum(not o["difficult"] for of_image in objects for o in of_image)
        if count == 0:
            continue
        right = wrong = 0
        curve = []
        for _, image, box in sorted(lines, key=lambda line: -line[0]):
            best, best_overlap = None, -1.0
            for candidate in objects[image]:
                shared = common(box, candidate["box"])
                union = common(box, box) + common(candidate["box"], candidate["box"]) - shared
                if shared / union > best_overlap:
                    best, best_overlap = candidate, shared / union
            if best_overlap > threshold:
                if not best["difficult"]:
                    right, wrong = right + (not best["taken"]), wrong + best["taken"]
                    best["taken"] = True
            else:
                wrong += 1
            curve.append((right / count, right / max(right + wrong, 1)))
        highest = [max((p for r, p in curve if 10 * r >= tenth - 1e-9), default=0.0) for tenth in range(11)]
        precisions.append(sum(highest) / 11)
    return sum(precisions) / len(precisions)


@pytest.mark.parametrize("seed", range(4))
def test_voc_figures_are_those_of_the_devkits_procedure(seed: int) -> None:
    truths, found = draw_scene(seed, apart=False, with_difficult=True)
    figures = voc_figures(truths, found, NUM_CLASSES)
    expected = [voc_by_the_book(truths, found, threshold) for threshold in THRESHOLDS_T]
    assert figures["AP"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert figures["AP50"] == pytest.approx(expected[0], abs=1e-12)
    assert figures["AP75"] == pytest.approx(expected[5], abs=1e-12)
    assert 0 < figures["AP"] < figures["AP50"] < 1


def test_where_objects_are_apart_voc_figures_are_those_of_pycocotools_at_eleven_recalls() -> None:
    """There, the two protocols agree on which object a detection goes with."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths, found = draw_scene(9, apart=True, with_difficult=True)
    images = [{"id": i, "height": 400, "width": 2000} for i in range(1, len(truths) + 1)]
    categories = [{"id": label, "name": str(label)} for label in range(1, NUM_CLASSES + 1)]
    sets = []
    for of_images, names in ((truths, ("boxes_O4", "labels_O")), (found, ("boxes_D4", "labels_D"))):
        annotations = []
        for image, of_image in enumerate(of_images, start=1):
            boxes, labels = (getattr(of_image, name) for name in names)
            for place, (box, label) in enumerate(zip(boxes, labels, strict=True)):
                annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label)}
                annotation |= {"bbox": [*box[:2], *(box[2:] - box[:2])], "iscrowd": 0, "area": 50.0}
                if of_images is found:
                    annotation["score"] = of_image.scores_D[place]
                elif of_image.difficult_O[place]:
                    annotation["area"] = 5000.0  # outside of the range of areas: ignored
                annotations.append(annotation)
        sets.append({"images": images, "categories": categories, "annotations": annotations})
    with redirect_stdout(io.StringIO()):
        apis = []
        for content in sets:
            api = COCO()
            api.dataset = content
            api.createIndex()
            apis.append(api)
        evaluation = COCOeval(*apis, "bbox")
        evaluation.params.recThrs = np.linspace(0, 1, 11) - 1e-9
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 100]], ["small"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision_T = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(1, 2))
    figures = voc_figures(truths, found, NUM_CLASSES)
    assert figures["AP"] == pytest.approx(precision_T.mean(), abs=1e-12)
    assert figures["AP50"] == pytest.approx(precision_T[0], abs=1e-12)
    assert figures["AP75"] == pytest.approx(precision_T[5], abs=1e-12)


def test_perfect_detections_score_one_and_a_class_without_objects_counts_for_nothing() -> None:
    truths, _ = draw_scene(3, apart=False, with_difficult=True)
    found = [Detections(t.boxes_O4, t.labels_O, np.ones(len(t.labels_O))) for t in truths]
    assert voc_figures(truths, found, NUM_CLASSES + 2) == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}


def test_of_two_detections_of_one_object_the_better_scored_is_right() -> None:
    truth = Truth(np.array([[0, 0, 10, 10.0]]), np.array([1]), np.array([False]))
    boxes = np.array([[0, 0, 10, 8.0], [0, 0, 10, 10.0]])
    found = Detections(boxes, np.array([1, 1]), np.array([0.9, 0.8]))
    # The first overlaps by 0.8: up to 0.75 it takes the object, above the second one does, at half precision.
    assert voc_figures([truth], [found], 1) == pytest.approx({"AP": 0.8, "AP50": 1.0, "AP75": 1.0})


def test_overlap_is_torchvisions() -> None:
    from torchvision.ops import box_iou

    truths, found = draw_scene(5, apart=False, with_difficult=False)
    boxes, others = np.concatenate([f.boxes_D4 for f in found]), np.concatenate([t.boxes_O4 for t in truths])
    np.testing.assert_allclose(
        overlap(boxes, others), box_iou(*map(torch.from_numpy, (boxes, others))), rtol=1e-12, atol=0
    )


@pytest.fixture(scope="module")
def coco_scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], list[dict], list[int]]:
    """A file of annotations, the same objects as tensors, detections as tensors, and the ids of the images.

    Category ids have gaps and are out of order, as in COCO's file.
    """
    random = np.random.default_rng(0)
    ids = [42, 7, 99, 3]
    categories = [{"id": 90, "name": "c"}, {"id": 5, "name": "a"}, {"id": 17, "name": "b"}]
    annotations, truths, found = [], [], []
    for image_id in ids:
        count = int(random.integers(2, 6))
        corners = random.integers(0, 50, (count, 2))
        boxes = np.concatenate([corners, corners + random.integers(10, 45, (count, 2))], axis=1)
        labels = random.integers(1, 4, count)
        moved = (boxes + random.integers(-4, 5, boxes.shape)).clip(0, 100)
        scores = (random.permutation(count) + random.random()) / 10
        for box, label in zip(boxes, labels, strict=True):
            x1, y1, x2, y2 = map(int, box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": [5, 17, 90][label - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                }
            )
        truths.append({"boxes": boxes, "labels": labels, "masks": filled(boxes)})
        found.append({"boxes": moved, "labels": labels, "masks": filled(moved), "scores": scores})
    images = [{"id": i, "height": 100, "width": 100, "file_name": f"{i}.jpg"} for i in ids]
    path = tmp_path_factory.mktemp("coco") / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    tensors = [
        [{name: torch.from_numpy(value) for name, value in d.items()} for d in s] for s in (truths, found)
    ]
    return path, *tensors, ids


def filled(boxes: np.ndarray) -> np.ndarray:
    """Masks (count, 100, 100) of these boxes."""
    masks = np.zeros((len(boxes), 100, 100), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    return masks


def test_coco_figures_are_those_of_torchmetrics(coco_scene: tuple) -> None:
    from torchmetrics.detection import MeanAveragePrecision

    path, truths, found, ids = coco_scene
    results = []
    for image_id, of_image in zip(ids, found, strict=True):
        results += coco_results(image_id, of_image | {"masks": 0.9 * of_image["masks"][:, None].double()})
    figures = coco_figures(path, results)
    # Its own thresholds are rounded to float32: a recall of 1 / 5 then falls short of 0.2.
    thresholds = {"iou_thresholds": np.linspace(0.5, 0.95, 10).tolist()}
    thresholds["rec_thresholds"] = np.linspace(0, 1, 101).tolist()
    for kind, prefix in (("bbox", ""), ("segm", "mask")):
        metric = MeanAveragePrecision(iou_type=kind, **thresholds)
        as_booleans = [[d | {"masks": d["masks"].bool()} for d in of_set] for of_set in (found, truths)]
        metric.update(*as_booleans)
        expected = metric.compute()
        for name, key in (("AP", "map"), ("AP50", "map_50"), ("AP75", "map_75")):
            assert figures[prefix + name] == pytest.approx(float(expected[key]), abs=1e-6)
    assert 0 < figures["AP"] < figures["AP50"]


def test_nothing_found_scores_zero(coco_scene: tuple) -> None:
    assert set(coco_figures(coco_scene[0], []).values()) == {0.0}
    truths, found = draw_scene(3, apart=False, with_difficult=False)
    empty = [Detections(np.empty((0, 4)), np.empty(0, int), np.empty(0)) for _ in found]
    assert set(voc_figures(truths, empty, NUM_CLASSES).values()) == {0.0}


def test_annotations_that_vanish_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json"):
        coco_figures(tmp_path / "gone.json", [])
