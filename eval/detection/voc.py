"""Pascal VOC as its devkit stores it: XML annotations, and lists of images."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from eval.detection.images import AnnotatedImages, ImageRecord, checked_boxes, explained, path_finder
from pipelines.errors import DataError

CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
]
TRAIN = (("VOC2007", "trainval"), ("VOC2012", "trainval"))
TEST = (("VOC2007", "test"),)


def open_voc(root: Path) -> tuple[AnnotatedImages, AnnotatedImages]:
    """VOC07+12: trainval of both years to train on, test of 2007 to test.

    `root` holds VOC2007 and VOC2012, or VOCdevkit with them. Objects marked as difficult are among those to
    learn, as in detectron2. Raises `DataError` where a file is missing or an annotation is wrong.
    """
    root = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    return tuple(
        AnnotatedImages(
            root, CLASSES, (r for year, name in sets for r in _image_set(root / year, name, is_train))
        )
        for sets, is_train in ((TRAIN, True), (TEST, False))
    )


def _image_set(folder: Path, name: str, is_train: bool) -> list[ImageRecord]:
    """Its images, for training only those with objects."""
    path = folder / "ImageSets" / "Main" / f"{name}.txt"
    with explained(path):
        names = path.read_text(encoding="utf-8").split()
    image_path = path_finder(folder / "JPEGImages", path)
    records = []
    for image_id, stem in enumerate(names):
        annotation = folder / "Annotations" / f"{stem}.xml"
        with explained(annotation):
            record = _record(annotation, image_path(f"{stem}.jpg"), image_id)
        if len(record.boxes_O4) or not is_train:
            records.append(record)
    if all(record.difficult_O.all() for record in records):
        raise DataError(f"{path} lists no images with objects; check the path of the dataset.")
    return records


def _record(annotation: Path, image: Path, image_id: int) -> ImageRecord:
    tree = ElementTree.parse(annotation)
    width, height = (int(_text(tree, f"size/{side}")) for side in ("width", "height"))
    boxes, labels, difficult = [], [], []
    for entry in tree.findall("object"):
        name = _text(entry, "name")
        if name not in CLASSES:
            raise DataError(
                f"{annotation} has an object {name!r}, which is none of VOC's {len(CLASSES)} classes; "
                f"correct it or take it out."
            )
        x1, y1, x2, y2 = (float(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append((x1 - 1, y1 - 1, x2, y2))  # the devkit counts pixels from 1, and includes the last
        labels.append(CLASSES.index(name) + 1)
        difficult.append(int(entry.findtext("difficult", "0")) != 0)
    return ImageRecord(
        image,
        image_id,
        height,
        width,
        checked_boxes(boxes, height, width, str(annotation)),
        np.array(labels, dtype=np.int64),
        np.array(difficult, dtype=bool),
    )


def _text(parent: ElementTree.Element | ElementTree.ElementTree, path: str) -> str:
    """Of a descendant that must be there."""
    text = parent.findtext(path)
    if text is None:
        raise KeyError(path)
    return text.strip()
