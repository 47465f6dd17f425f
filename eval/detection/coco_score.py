"""COCO's figures, by COCO's own code (pycocotools)."""

import io
import json
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eval.detection.coco import category_ids
from eval.detection.images import explained

FIGURES = {"AP": 0, "AP50": 1, "AP75": 2}  # places in `COCOeval.stats`
KINDS = {"bbox": "", "segm": "mask"}  # by COCO's name, what precedes the figure's


def coco_results(image_id: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A detector's output for an image, in COCO's form but with labels, not category ids.

    `found` has boxes (D, 4), labels (D,), scores (D,) and masks (D, 1, H, W) in 0..1.
    """
    from pycocotools import mask

    boxes_D4 = found["boxes"].double().cpu().numpy()
    corners_D2, sides_D2 = boxes_D4[:, :2], boxes_D4[:, 2:] - boxes_D4[:, :2]
    results = []
    for place, label in enumerate(found["labels"].tolist()):
        is_inside_HW = (found["masks"][place, 0] > 0.5).cpu().numpy()
        results.append(
            {
                "image_id": image_id,
                "category_id": label,
                "bbox": [*corners_D2[place].tolist(), *sides_D2[place].tolist()],
                "score": float(found["scores"][place]),
                "segmentation": mask.encode(np.asfortranarray(is_inside_HW, dtype=np.uint8)),
            }
        )
    return results


def coco_figures(annotations: Path, results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """AP, AP50 and AP75 of boxes and of masks (maskAP...), shares from 0 to 1.

    `results` are those of `coco_results` for all images in the file `annotations`. Raises `DataError` where
    that cannot be read.
    """
    with explained(annotations):
        content = json.loads(annotations.read_text(encoding="utf-8"))
        numbers = list(category_ids(content))
    results = [result | {"category_id": numbers[result["category_id"] - 1]} for result in results]
    if not results:
        return {prefix + name: 0.0 for prefix in KINDS.values() for name in FIGURES}
    figures = {}
    with redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        for kind, prefix in KINDS.items():
            stats = _stats(content, results, kind)
            figures |= {prefix + name: float(stats[place]) for name, place in FIGURES.items()}
    return figures


def _stats(content: dict[str, Any], results: list[dict[str, Any]], kind: str) -> np.ndarray:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = content
    truth.createIndex()
    # A copy of each: COCO adds areas to them, of the boxes where it finds any.
    wanted = {"image_id", "category_id", "score", {"bbox": "bbox", "segm": "segmentation"}[kind]}
    found = truth.loadRes([{key: result[key] for key in wanted} for result in results])
    evaluation = COCOeval(truth, found, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats
