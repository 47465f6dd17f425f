"""Miniatures of published data sets, in their makers' layout and file formats."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from pipelines.source.voc import VOC_CLASSES

PLACES_FOLDERS = ("a/abbey", "a/apartment_building/outdoor", "y/yard")
PLACES_IMAGES = "data/vision/torralba/deeplearning/images256"
INAT_CATEGORIES = {0: "Abies", 3: "Bufo", 7: "Cyanistes"}  # ids have gaps where a category was withdrawn

VocObject = tuple[str, bool, tuple[int, int, int, int]]  # class, difficult, box (xmin, ymin, xmax, ymax)


def write_image(file: Path, level: float, random: np.random.Generator) -> None:
    """A JPEG of varied size: noise around the grey `level`, 0 to 1."""
    height, width = random.integers(24, 60, 2)
    pixels_HW3 = random.normal(255 * level, 10, (height, width, 3)).clip(0, 255).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_HW3).save(file, quality=95)


def write_places(root: Path, train_per_class: int = 4, val_per_class: int = 2) -> None:
    """Places-205 with three of its classes, each of a brightness of its own."""
    random = np.random.default_rng(0)
    for part, per_class in (("train", train_per_class), ("val", val_per_class)):
        lines = []
        for label, folder in enumerate(PLACES_FOLDERS):
            for number in range(per_class):
                name = f"{folder}/gsun_{part}{number:02}.jpg"
                write_image(root / PLACES_IMAGES / name, (label + 1) / 4, random)
                lines.append(f"{name} {label}\n")
        file = root / "trainvalsplit_places205" / f"{part}_places205.csv"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(lines))


def write_inat(root: Path, train_per_class: int = 4, val_per_class: int = 2) -> None:
    """iNaturalist 2018 with three categories, each of a brightness of its own."""
    random = np.random.default_rng(0)
    next_id = 1
    for part, per_class in (("train", train_per_class), ("val", val_per_class)):
        images, annotations = [], []
        for rank, category in enumerate(INAT_CATEGORIES):
            for number in range(per_class):
                name = f"train_val2018/Plantae/{category}/{part}{number:02}.jpg"
                write_image(root / name, (rank + 1) / 4, random)
                images.append({"id": next_id, "file_name": name, "width": 1, "height": 1})
                annotations.append({"id": next_id, "image_id": next_id, "category_id": category})
                next_id += 1
        categories = [
            {"id": id_, "name": name, "supercategory": "Plantae"} for id_, name in INAT_CATEGORIES.items()
        ]
        annotations.reverse()  # their order is their own
        content = {"images": images, "annotations": annotations, "categories": categories[::-1]}
        (root / f"{part}2018.json").write_text(json.dumps(content))


def write_voc(
    devkit: Path, parts: dict[str, dict[str, list[VocObject]]], *, year: str = "VOC2007", lists: bool = True
) -> None:
    """A VOC devkit: for each part its images, by name, with their objects.

    An object is a rectangle, of a grey of its class's own, on noise. Without `lists`, the files that say
    which image shows which class are left out.
    """
    root, random = devkit / year, np.random.default_rng(0)
    sets = root / "ImageSets" / "Main"
    for folder in (sets, root / "JPEGImages", root / "Annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    for part, images in parts.items():
        (sets / f"{part}.txt").write_text("".join(f"{name}\n" for name in images))
        for name, objects in images.items():
            _write_voc_image(root, name, objects, random)
        for kind in VOC_CLASSES if lists else ():
            lines = [f"{name} {_presence(kind, objects):2d}\n" for name, objects in images.items()]
            (sets / f"{kind}_{part}.txt").write_text("".join(lines))


def _presence(kind: str, objects: list[VocObject]) -> int:
    """The devkit's rule: 1 for an object that is not difficult, 0 for difficult ones only, -1 for none."""
    difficult = [is_difficult for name, is_difficult, _ in objects if name == kind]
    if not difficult:
        return -1
    return 0 if all(difficult) else 1


def _write_voc_image(root: Path, name: str, objects: list[VocObject], random: np.random.Generator) -> None:
    height, width = random.integers(60, 100, 2)
    pixels_HW3 = random.normal(128, 10, (height, width, 3))
    annotation = ElementTree.Element("annotation")
    for tag, text in (("folder", root.name), ("filename", f"{name}.jpg")):
        ElementTree.SubElement(annotation, tag).text = text
    size = ElementTree.SubElement(annotation, "size")
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, tag).text = str(value)
    for kind, is_difficult, box in objects:
        left, top, right, bottom = box
        pixels_HW3[top - 1 : bottom, left - 1 : right] = 255 * VOC_CLASSES.index(kind) / 19
        entry = ElementTree.SubElement(annotation, "object")
        for tag, text in (("name", kind), ("difficult", str(int(is_difficult)))):
            ElementTree.SubElement(entry, tag).text = text
        bounds = ElementTree.SubElement(entry, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(bounds, tag).text = str(value)
    ElementTree.ElementTree(annotation).write(root / "Annotations" / f"{name}.xml")
    image = Image.fromarray(pixels_HW3.clip(0, 255).astype(np.uint8))
    image.save(root / "JPEGImages" / f"{name}.jpg", quality=95)


def draw_voc_objects(count: int, first: int, seed: int) -> dict[str, list]:
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
