"""PASCAL VOC 2007 as a task of classification: which of twenty kinds of objects an image shows.

Shape legend: N images, C = 20 classes.
"""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from pipelines.errors import DataError
from pipelines.source.files import FileSource, check_present

YEAR = "VOC2007"
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
PRESENT, DIFFICULT, ABSENT = 1, 0, -1


class Voc07Source(FileSource):
    """The images of one part ("trainval", "test", ...) of the devkit, each with any number of classes.

    `presence_NC`, int8: 1 where the image shows an object of the class, 0 where all such objects are marked
    as difficult, -1 where there is none. From ImageSets/Main/<class>_<part>.txt, which say just this, or,
    where these are missing, from the objects in Annotations. There is no single label: `classes` is empty.
    """

    presence_NC: np.ndarray

    def __init__(self, devkit: Path, part: str) -> None:
        """`devkit`: the folder VOCdevkit, or VOC2007 in it.

        Raises `DataError` where it is another year's or lacks the part, a list is not of its form or
        images are absent.
        """
        root = _year_folder(devkit)
        sets = root / "ImageSets" / "Main"
        names = _read_names(sets / f"{part}.txt", part)
        if all((sets / f"{name}_{part}.txt").is_file() for name in VOC_CLASSES):
            columns = [_read_presence(sets / f"{name}_{part}.txt", names) for name in VOC_CLASSES]
            self.presence_NC = np.array(columns, np.int8).T
        else:
            self.presence_NC = np.array([_presence_in(root, name) for name in names], np.int8)
        files = [f"{root}/JPEGImages/{name}.jpg" for name in names]
        check_present(files, sets / f"{part}.txt")
        super().__init__(root, [], files, np.zeros(len(files), np.int64))


def _year_folder(devkit: Path) -> Path:
    if (devkit / YEAR / "ImageSets").is_dir():
        return devkit / YEAR
    if (devkit / "ImageSets").is_dir() and devkit.name == YEAR:
        return devkit
    others = [devkit] if (devkit / "ImageSets").is_dir() else sorted(devkit.glob("VOC20*"))
    found = f"holds {others[0].name}, not {YEAR}" if others else f"holds no folder {YEAR}"
    raise DataError(f"{devkit} {found}; unpack the archives of the year 2007 and name their VOCdevkit.")


def _read_names(file: Path, part: str) -> list[str]:
    names = _read_text(file, f"the images of {part}, from the archive of that part").split()
    if not names:
        raise DataError(f"{file} is empty; unpack the archive of {part} again.")
    other = next((name for name in names if not name.isdecimal()), None)
    if other is not None:  # from 2008 on: 2008_000008
        raise DataError(
            f"{file} lists {other[:80]}, which is no image of 2007; unpack the archives of that year."
        )
    return names


def _read_presence(file: Path, names: list[str]) -> list[int]:
    """One of the class's three values for each of `names`."""
    rows = [line.split() for line in _read_text(file, "its class").splitlines() if line.strip()]
    if [row[0] for row in rows] != names:
        raise DataError(f"{file} does not list the images of its part in order; unpack the archive again.")
    values = {"1": PRESENT, "0": DIFFICULT, "-1": ABSENT}
    wrong = next((row for row in rows if len(row) != 2 or row[1] not in values), None)
    if wrong is not None:
        raise DataError(
            f"{file} has the label {' '.join(wrong[1:])!r} for image {wrong[0]}, not 1, 0 or -1; unpack the "
            f"archive again."
        )
    return [values[value] for _, value in rows]


def _presence_in(root: Path, name: str) -> list[int]:
    """The twenty values of one image by its objects."""
    file = root / "Annotations" / f"{name}.xml"
    presence = dict.fromkeys(VOC_CLASSES, ABSENT)
    try:
        objects = ElementTree.fromstring(_read_text(file, "the objects of an image")).iter("object")
    except ElementTree.ParseError as error:
        raise DataError(f"{file} is not XML ({error}); unpack the archive again.") from error
    for entry in objects:
        kind = entry.findtext("name", "").strip()
        if kind not in presence:
            raise DataError(f"{file} has an object {kind!r}, which is none of the 20 classes of VOC.")
        seen = DIFFICULT if entry.findtext("difficult", "0").strip() == "1" else PRESENT
        presence[kind] = max(presence[kind], seen)
    return list(presence.values())


def _read_text(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing, which lists {what}; unpack it there.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"{file} cannot be read ({reason}); unpack it again.") from error
