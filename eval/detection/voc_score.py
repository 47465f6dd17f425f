"""Average precision by the protocol of Pascal VOC 2007, as the papers on self-supervision report it.

AP50 is VOC's own figure. AP is its mean over thresholds of overlap from 0.5 to 0.95, as in COCO, but each one
measured by VOC's rules and 11 points of the curve: that is what detectron2's evaluator of VOC 2007 prints,
and so what stands in the tables of MoCo and of the paper.

The devkit counts the last row and column of a box as part of it; with boxes such that x2 - x1 is the width,
the same overlap has no "+ 1" in it.

Shape legend: N images, O objects and D detections of an image, P detections of a class in all images,
T thresholds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS_T = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 11)


@dataclass(frozen=True)
class Truth:
    """The objects of an image."""

    boxes_O4: np.ndarray
    labels_O: np.ndarray
    difficult_O: np.ndarray  # bool: whether found or not does not count


@dataclass(frozen=True)
class Detections:
    """What was found in an image."""

    boxes_D4: np.ndarray
    labels_D: np.ndarray
    scores_D: np.ndarray


def voc_figures(
    truths_N: Sequence[Truth], found_N: Sequence[Detections], num_classes: int
) -> dict[str, float]:
    """AP, AP50 and AP75, shares from 0 to 1: means over the classes 1 to `num_classes`.

    A class without objects to find counts for nothing: its precision is not defined. There must be one with.
    """
    classes = [_average_precision(truths_N, found_N, label) for label in range(1, num_classes + 1)]
    precision_T = np.mean([ap_T for ap_T in classes if ap_T is not None], axis=0)
    at = {round(100 * threshold): float(ap) for threshold, ap in zip(THRESHOLDS_T, precision_T, strict=True)}
    return {"AP": float(precision_T.mean()), "AP50": at[50], "AP75": at[75]}


def _average_precision(
    truths_N: Sequence[Truth], found_N: Sequence[Detections], label: int
) -> np.ndarray | None:
    """(T,) of one class; None where it has no objects to find.

    1. each detection goes with the object of its class that it overlaps most, taken or not
    2. in order of their scores, in all images together, it is right if they overlap by more than the
       threshold and the object is not taken yet; then it takes it. With a difficult one it counts for nothing
    3. the highest precision at each recall or a higher one, averaged over the 11 recalls
    """
    num_objects = sum(int(((truth.labels_O == label) & ~truth.difficult_O).sum()) for truth in truths_N)
    if not num_objects:
        return None
    scores, overlaps, objects, difficult = [], [], [], []
    seen = 0  # objects of the class in earlier images
    for truth, found in zip(truths_N, found_N, strict=True):
        is_truth, is_found = truth.labels_O == label, found.labels_D == label
        overlap_DO = overlap(found.boxes_D4[is_found], truth.boxes_O4[is_truth])
        scores.append(found.scores_D[is_found])
        if is_truth.any():
            best_D = overlap_DO.argmax(axis=1)  # 1
            overlaps.append(overlap_DO.max(axis=1))
            objects.append(seen + best_D)
            difficult.append(truth.difficult_O[is_truth][best_D])
        else:
            overlaps.append(np.zeros(len(overlap_DO)))
            objects.append(np.full(len(overlap_DO), -1))
            difficult.append(np.zeros(len(overlap_DO), dtype=bool))
        seen += int(is_truth.sum())
    order_P = np.argsort(-np.concatenate(scores), kind="stable")
    overlap_P, object_P, difficult_P = (
        np.concatenate(parts)[order_P] for parts in (overlaps, objects, difficult)
    )
    return np.array([_at_threshold(overlap_P > t, object_P, difficult_P, num_objects) for t in THRESHOLDS_T])


def _at_threshold(
    is_near_P: np.ndarray, object_P: np.ndarray, difficult_P: np.ndarray, num_objects: int
) -> float:
    counts_P = ~(is_near_P & difficult_P)  # 2
    near = np.flatnonzero(is_near_P & counts_P)
    _, first = np.unique(object_P[near], return_index=True)
    is_right_P = np.zeros(len(object_P), dtype=bool)
    is_right_P[near[first]] = True
    right_P = np.cumsum(is_right_P)
    recall_P = right_P / num_objects
    precision_P = right_P / np.maximum(np.cumsum(counts_P), 1)
    # 3. The tolerance keeps recalls such as 3 / 10 from falling short of 0.3 by rounding.
    return float(np.mean([precision_P[recall_P >= r - 1e-12].max(initial=0) for r in RECALLS]))


def overlap(boxes_D4: np.ndarray, others_O4: np.ndarray) -> np.ndarray:
    """(D, O): intersection over union."""
    upper_DO2 = np.maximum(boxes_D4[:, None, :2], others_O4[None, :, :2])
    lower_DO2 = np.minimum(boxes_D4[:, None, 2:], others_O4[None, :, 2:])
    common_DO = (lower_DO2 - upper_DO2).clip(0).prod(axis=2)
    area_D, area_O = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes_D4, others_O4))
    return common_DO / (area_D[:, None] + area_O[None] - common_DO)
