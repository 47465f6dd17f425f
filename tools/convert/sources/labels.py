"""Labels that come apart from the images: files beside them, lists, ImageNet's development kit."""

import re
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.errors import DataError
from tools.convert.sources.base import ListedImages, printable
from tools.convert.sources.subset import match_names

MAX_LABEL = 1 << 20
_TRUTH_NAME, _META_NAME = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_SEPARATORS = re.compile(r"[,\t ]")


def from_words(words: Sequence[str], what: str) -> tuple[list[str], np.ndarray]:
    """Class names and the label of each word, int32.

    Numbers are the labels themselves, from 0, and name their classes; otherwise each distinct word is a
    class, in alphabetical order. `what` begins the sentence of a `DataError` about a label that is too large.
    """
    if all(word.isascii() and word.isdigit() for word in words):
        labels = [int(word) for word in words]
        if max(labels, default=0) > MAX_LABEL:
            raise DataError(
                f"{what} hold the label {max(labels)}, which is too large; number the classes from 0."
            )
        return [str(label) for label in range(max(labels, default=-1) + 1)], np.array(labels, np.int32)
    classes = sorted(set(words))
    position = {name: label for label, name in enumerate(classes)}
    return classes, np.array([position[word] for word in words], np.int32)


def set_ground_truth(images: ListedImages, file: Path) -> None:
    """Label `images`, which have no labels, from a file, which may be

    - ImageNet's development kit, `ILSVRC2012_devkit_t12.tar.gz`, or its file of that name beside `meta.mat`
      in the unpacked kit: classes are the WordNet names (n01440764), in alphabetical order, as in the folders
      and archives of the training images;
    - a list with one class per line, in the order of the images' file names;
    - a list of lines "file class", separated by a blank, a tab or a comma, in any order (Kaggle's
      `LOC_val_solution.csv`, Caffe's `val.txt`); the file is named as in `keep_subset`, and the class is the
      rest of the line.

    A class is a name, or a label from 0; see `from_words`. Raises `DataError`, also where two lines
    disagree or one fits several images, and `OSError`.
    """
    if images.classes:
        raise DataError(
            f"{images.path} has labels of its own ({len(images.classes)} classes); leave out --ground-truth "
            "or pass --unlabelled."
        )
    lines = _kit_classes(file)
    if lines is None:
        lines = file.read_text(encoding="utf-8").splitlines()
    rows = [
        (number, *_SEPARATORS.split(line.strip(), maxsplit=1))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    is_kaggle = bool(rows) and rows[0][1:] == ("ImageId", "PredictionString")
    if is_kaggle:  # each line goes on with the boxes of objects
        rows = [(*row[:2], *("".join(rest.split()[:1]) for rest in row[2:])) for row in rows[1:]]
    if all(len(row) == 2 for row in rows):
        if len(rows) != len(images):
            raise DataError(
                f"{file} has {len(rows)} labels for the {len(images)} images in {images.path}; "
                "give one line for each image."
            )
        order = sorted(range(len(images)), key=images.names.__getitem__)
        words = [""] * len(images)
        for index, (_, word) in zip(order, rows, strict=True):
            words[index] = word
    elif all(len(row) == 3 for row in rows):
        words = _words_by_name(images, rows, file)
    else:
        raise DataError(
            f"{file} is no list of labels; write one class, or a file and its class, on each line."
        )
    classes, labels_N = from_words(words, f"The lines of {file}")
    present = np.unique(labels_N)
    if present[0] == 1 and len(present) == len(classes) - 1:  # of words, 0 would be there
        raise DataError(
            f"The labels in {file} are numbers from 1 to {present[-1]}; number the classes from 0, or give "
            "ILSVRC2012_devkit_t12.tar.gz if these are its numbers."
        )
    images.set_labels(classes, labels_N)


def _words_by_name(images: ListedImages, rows: Sequence[tuple[int, str, str]], file: Path) -> list[str]:
    """The class of each image, from rows (line, file, class)."""
    line_of: dict[bytes, int] = {}
    word_of: dict[bytes, str] = {}
    for line, shown, rest in rows:
        word = rest.strip()
        if not shown or not word:
            raise DataError(f"Line {line} of {file} lacks a file or its class; write both.")
        name = shown.encode()
        if word_of.setdefault(name, word) != word:
            raise DataError(
                f"Lines {line_of[name]} and {line} of {file} give '{shown}' different classes; remove one."
            )
        line_of[name] = line
    words = []
    for index, found in enumerate(match_names(images, line_of, file)):
        stated = {word_of[name]: line_of[name] for name in found}
        if not stated:
            raise DataError(f"{file} has no label for '{images.name(index)}'; give a line for each image.")
        if len(stated) > 1:
            first, second, *_ = sorted(stated.values())
            raise DataError(
                f"Lines {first} and {second} of {file} give '{images.name(index)}' different classes; "
                "remove one."
            )
        words += stated
    return words


def _kit_classes(file: Path) -> list[str] | None:
    """The validation images' WordNet names in the order of their numbers, from the development kit."""
    if tarfile.is_tarfile(file):
        found: dict[str, bytes] = {}
        with tarfile.open(file) as kit:
            for member in kit:
                name = Path(member.name).name
                if name in (_TRUTH_NAME, _META_NAME) and member.isfile():
                    found[name] = kit.extractfile(member).read()
        if len(found) != 2:
            raise DataError(
                f"{file} holds no {_TRUTH_NAME} and {_META_NAME}; give ILSVRC2012_devkit_t12.tar.gz."
            )
        return _decode_kit(found[_TRUTH_NAME], BytesIO(found[_META_NAME]), file)
    if file.name != _TRUTH_NAME:
        return None
    meta = file.with_name(_META_NAME)
    if not meta.is_file():
        raise DataError(
            f"The numbers in {file} mean nothing without {_META_NAME}, which belongs beside it; "
            "give ILSVRC2012_devkit_t12.tar.gz instead."
        )
    with meta.open("rb") as content:
        return _decode_kit(file.read_bytes(), content, file)


def _decode_kit(truth: bytes, meta: BinaryIO, file: Path) -> list[str]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"Reading {printable(file)} takes scipy; run `pip install scipy`, "
            "or give a list with one class per line."
        ) from error
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        name_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [name_of[int(number)] for number in truth.split()]
    except Exception as error:  # scipy raises many kinds for damaged files
        raise DataError(f"{file} is damaged ({error}); download it again.") from error
