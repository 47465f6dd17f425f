"""COCO: one JSON file of annotations for each split."""

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from eval.detection.images import AnnotatedImages, ImageRecord, checked_boxes, explained, path_finder
from pipelines.errors import DataError

_log = logging.getLogger(__name__)


def open_coco(root: Path) -> tuple[AnnotatedImages, AnnotatedImages]:
    """train2017 to train on, val2017 to test; the annotations are `root`/annotations/instances_*.json.

    For training, images without objects are left out, and so are crowds and boxes without area, of which
    COCO has a few. Raises `DataError` where a file is missing or an annotation is wrong.
    """
    train, test = (_open_split(root, split) for split in ("train2017", "val2017"))
    if train.classes != test.classes:
        raise DataError(f"The categories of {train.path} and {test.path} differ; take them from one release.")
    return train, test


def category_ids(content: dict[str, Any]) -> dict[int, str]:
    """COCO's numbers of the categories, which have gaps, in the order of the labels 1, 2, 3 and so on."""
    return {int(c["id"]): str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}


def _open_split(root: Path, split: str) -> AnnotatedImages:
    path = root / "annotations" / f"instances_{split}.json"
    with explained(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = category_ids(content)
        records = _records(content, root / split, path)
    with_objects = [record for record in records if len(record.boxes_O4)]
    if not with_objects:
        raise DataError(f"{path} has no objects; check the path of the dataset.")
    if split.startswith("train"):
        records = with_objects
    return AnnotatedImages(path, list(categories.values()), records)


def _records(content: dict[str, Any], folder: Path, path: Path) -> list[ImageRecord]:
    image_path = path_finder(folder, path)
    label_of = {number: label for label, number in enumerate(category_ids(content), start=1)}
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in content["images"]}
    objects: dict[int, list[tuple]] = defaultdict(list)  # by image
    empty = 0
    for annotation in content["annotations"]:
        where = f"annotation {annotation['id']} of {path}"
        image_id, category = annotation["image_id"], annotation["category_id"]
        if image_id not in sizes:
            raise DataError(f"The {where} is for image {image_id}, which is not listed; correct the file.")
        if category not in label_of:
            raise DataError(f"The {where} has category {category}, which is not listed; correct the file.")
        if annotation.get("iscrowd", 0):
            continue
        x, y, width, height = map(float, annotation["bbox"])
        if width <= 0 or height <= 0:
            empty += 1
            continue
        box_14 = checked_boxes([(x, y, x + width, y + height)], *sizes[image_id], where)
        objects[image_id].append((box_14[0], label_of[category], annotation["segmentation"]))
    if empty:
        _log.warning("%s has %d boxes without area, which are left out.", path, empty)
    records = []
    for image in content["images"]:
        found = objects[image["id"]]
        records.append(
            ImageRecord(
                image_path(image["file_name"]),
                int(image["id"]),
                *sizes[image["id"]],
                np.array([box for box, _, _ in found], dtype=np.float32).reshape(-1, 4),
                np.array([label for _, label, _ in found], dtype=np.int64),
                np.zeros(len(found), dtype=bool),
                [segmentation for _, _, segmentation in found],
            )
        )
    return records
