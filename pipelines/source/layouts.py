"""Data sets as their makers publish them: lists of images, and the images where the archives put them.

Named `places205:ROOT` or `inat18:ROOT`, with `:val` behind it for the validation images; `voc07:ROOT` for the
images of trainval, which have no single label, `voc07:ROOT:test` for those of test.

Shape legend: N images of a list.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.errors import DataError
from pipelines.source.files import FileSource, check_present
from pipelines.source.voc import Voc07Source


def places205(root: Path, part: str) -> FileSource:
    """Places-205 (Zhou et al. 2014) as unpacked from its two archives.

        trainvalsplit_places205/train_places205.csv, val_places205.csv    "a/abbey/gsun_01.jpg 0" a line
        data/vision/torralba/deeplearning/images256/a/abbey/gsun_01.jpg

    A class is named after the folder of its images, "a/abbey". Raises `DataError` where a list is missing or
    has a line of another form, labels are not 0 to the number of classes, the lists differ in what a label
    means, or images are absent.
    """
    lists, images = root / "trainvalsplit_places205", root / "data/vision/torralba/deeplearning/images256"
    train, train_labels_N = _read_list(lists / "train_places205.csv")
    num_classes = int(train_labels_N.max()) + 1
    folders: list[set[str]] = [set() for _ in range(num_classes)]
    for name, label in zip(train, train_labels_N.tolist(), strict=True):
        folders[label].add(name.rpartition("/")[0])
    if set() in folders:
        raise DataError(
            f"{lists / 'train_places205.csv'} has labels up to {num_classes - 1}, but no image with label "
            f"{folders.index(set())}; download the list again."
        )
    names, labels_N, file = train, train_labels_N, lists / f"{part}_places205.csv"
    if part != "train":
        names, labels_N = _read_list(file)
        for line, (name, label) in enumerate(zip(names, labels_N.tolist(), strict=True), start=1):
            if label >= num_classes or name.rpartition("/")[0] not in folders[label]:
                raise DataError(
                    f"Line {line} of {file} gives {name} the label {label}, which is no class of such images "
                    f"in the training list; take both lists from the same archive."
                )
    files = [f"{images}/{name}" for name in names]
    check_present(files, file)
    return FileSource(_spec("places205", root, part), [min(of) for of in folders], files, labels_N)


def inat18(root: Path, part: str) -> FileSource:
    """iNaturalist 2018 (Van Horn et al. 2018) as unpacked from its archives.

        train2018.json, val2018.json    COCO's form: images, annotations, categories
        train_val2018/Plantae/7477/....jpg

    The label of an image is the rank of its category's id. Raises `DataError` where a file of annotations is
    missing or not of this form, an image has no category, several, or an unknown one, or images are absent.
    """
    file = root / f"{part}2018.json"
    content = _read_json(file)
    try:
        categories = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])
        names = {int(entry["id"]): str(entry["file_name"]) for entry in content["images"]}
        pairs = [(int(entry["image_id"]), int(entry["category_id"])) for entry in content["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f"{file} has not the images, annotations and categories of COCO's form ({reason}); download it "
            f"again."
        ) from error
    classes = [name for _, name in categories]
    if len(set(classes)) < len(classes):
        classes = [f"{id_} {name}" for id_, name in categories]
    ranks = {id_: rank for rank, (id_, _) in enumerate(categories)}
    labels: dict[int, int] = {}
    for image, category in pairs:
        if image not in names or category not in ranks or image in labels:
            what = "a second time" if image in labels else f"with category {category}"
            raise DataError(
                f"{file} annotates image {image} {what}, which its lists of images and categories do not "
                f"allow; download it again."
            )
        labels[image] = ranks[category]
    if len(labels) < len(names) or not names:
        raise DataError(
            f"{file} has {len(names):,} images, but {len(labels):,} annotations; download it again."
        )
    files = [f"{root}/{name}" for name in names.values()]
    check_present(files, file)
    labels_N = np.array([labels[image] for image in names], np.int64)
    return FileSource(_spec("inat18", root, part), classes, files, labels_N)


class Layout(NamedTuple):
    """How to open a part of a data set, and its parts: to train on, to test on."""

    open: Callable[[Path, str], FileSource]
    parts: tuple[str, str]


# By the name that stands before the root.
LAYOUTS = {
    "places205": Layout(places205, ("train", "val")),
    "inat18": Layout(inat18, ("train", "val")),
    "voc07": Layout(Voc07Source, ("trainval", "test")),
}


def names_layout(path: Path) -> bool:
    """Whether `path` begins with the name of a layout."""
    return str(path).partition(":")[0] in LAYOUTS and ":" in str(path)


def open_layout(path: Path) -> FileSource:
    """What `path`, such as `places205:/data/places205:val`, names. Raises `DataError`."""
    name, root, *part = str(path).split(":")
    layout = LAYOUTS[name]
    if not root or len(part) > 1 or (part and part[0] not in layout.parts):
        raise DataError(
            f"{path} names no part of a dataset; write {name}:ROOT for the training images, or "
            f"{name}:ROOT:{layout.parts[1]}."
        )
    return layout.open(Path(root), part[0] if part else layout.parts[0])


def _spec(name: str, root: Path, part: str) -> Path:
    return Path(f"{name}:{root}:{part}")


def _read_list(file: Path) -> tuple[list[str], np.ndarray]:
    """Names and labels, int64 (N,), of the lines "name label". Raises `DataError`."""
    names, labels = [], []
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise DataError(
                f"Line {number} of {file} is {line.strip()[:80]!r}, not a path and a label from 0 on; "
                f"download the list again."
            )
        names.append(name.strip().lstrip("/"))
        labels.append(int(label))
    if not names:
        raise DataError(f"{file} is empty; download the list again.")
    return names, np.array(labels, np.int64)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a JSON object with images, annotations and categories.")
    return content


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"The annotations {file} are missing; unpack them there.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"The annotations {file} cannot be read ({reason}); download them again.") from error
