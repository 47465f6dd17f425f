"""Attributes of images: from a CSV file, and those that every image file betrays.

Shape legend: N images drawn.
"""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.audit.sample import Drawn
from pipelines.errors import DataError
from pipelines.source import Source, read_image

MAX_CATEGORIES = 10  # a numeric column with more values is cut into thirds
UNKNOWN = -1
THIRDS = "lowest third", "middle third", "highest third"
BRIGHTNESS_WEIGHTS = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2, as PIL's mode L


@dataclass(frozen=True)
class Attribute:
    """One value per image: the number of a category, or -1 where it is not known."""

    name: str
    categories: list[str]
    values_N: np.ndarray  # int64

    def members(self) -> dict[str, np.ndarray]:
        """Numbers of the images of each category."""
        return {name: np.flatnonzero(self.values_N == value) for value, name in enumerate(self.categories)}


def read_attributes(path: Path, drawn: Drawn) -> list[Attribute]:
    """The columns of a CSV file, but for `name`, which says which image a row is about.

    A name is the number of a sample (in all rows, from 0), or the end of its path that no other sample
    shares, such as `cat/7.jpg`. Empty cells are unknown. Text is a category; numbers of more than
    `MAX_CATEGORIES` values are cut into thirds of the images drawn.

    Raises `DataError` where the file cannot be read, lacks the column, names images that are not there,
    the same image twice, or none of those drawn.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"The attributes {path} cannot be read ({error}); pass a CSV file in UTF-8."
        ) from error
    if "name" not in columns or len(columns) < 2 or len(set(columns)) < len(columns):
        raise DataError(
            f"The attributes {path} need a column 'name' and one or more of other names "
            f"(it has {', '.join(map(repr, columns)) or 'none'}); change its first line."
        )
    if any(None in row for row in rows):
        raise DataError(f"The attributes {path} have a row with more cells than the first line; repair it.")
    samples = _samples([row["name"].strip() for row in rows], drawn.whole, path)
    row_of = dict(zip(samples, rows, strict=True))
    known = [row_of.get(index) for index in drawn.indices_N.tolist()]
    if not any(known):
        raise DataError(f"The attributes {path} are about none of the {len(drawn)} images looked at.")
    return [
        as_attribute(name, [row[name].strip() if row else "" for row in known])
        for name in columns
        if name != "name"
    ]


def image_attributes(drawn: Drawn) -> list[Attribute]:
    """What needs no file of attributes: size, shape, mean brightness and number of bytes.

    Bytes are unknown for images that are stored as pixels.
    """
    heights_N, widths_N = (sizes.astype(float) for sizes in drawn.sizes(np.arange(len(drawn))))
    values = {
        "pixels in the file": heights_N * widths_N,
        "width / height": widths_N / heights_N,
        "mean brightness": [_brightness(drawn, index) for index in range(len(drawn))],
        "bytes of the file": [_num_bytes(drawn, index) for index in range(len(drawn))],
    }
    return [_thirds(name, np.asarray(of, dtype=float)) for name, of in values.items()]


def as_attribute(name: str, cells: list[str]) -> Attribute:
    """Categories in the order of their names from text, one cell per image; an empty one is unknown."""
    filled = {cell for cell in cells if cell}
    if len(filled) > MAX_CATEGORIES and all(map(_is_number, filled)):
        return _thirds(name, np.array([float(cell) if cell else np.nan for cell in cells]))
    order = sorted(filled, key=lambda cell: (0, float(cell), cell) if _is_number(cell) else (1, 0.0, cell))
    number = {category: value for value, category in enumerate(order)}
    return Attribute(name, order, np.array([number.get(cell, UNKNOWN) for cell in cells], dtype=np.int64))


def _thirds(name: str, values_N: np.ndarray) -> Attribute:
    """Numbers, NaN where unknown, as thirds of about the same size; equal numbers share a third."""
    known_N = ~np.isnan(values_N)
    distinct = np.unique(values_N[known_N])
    if len(distinct) <= len(THIRDS):
        return as_attribute(
            name,
            [f"{value:g}" if is_known else "" for value, is_known in zip(values_N, known_N, strict=True)],
        )
    cuts = np.quantile(values_N[known_N], [1 / 3, 2 / 3])
    values = np.where(known_N, np.searchsorted(cuts, values_N), UNKNOWN)
    used = [value for value in range(len(THIRDS)) if (values == value).any()]
    renumbered = {old: new for new, old in enumerate(used)} | {UNKNOWN: UNKNOWN}
    return Attribute(
        name, [THIRDS[value] for value in used], np.array([renumbered[v] for v in values.tolist()], np.int64)
    )


def _samples(names: list[str], source: Source, path: Path) -> list[int]:
    """The number of the sample that each name means."""
    if not names:
        raise DataError(f"The attributes {path} have no rows.")
    if all(name.isdecimal() for name in names):
        samples = [int(name) if int(name) < len(source) else None for name in names]
    else:
        ends = _ends(source, {name.count("/") for name in names})
        samples = [ends.get(name) for name in names]
    if None in samples:
        wrong = samples.count(None)
        raise DataError(
            f"The attributes {path} name {wrong} images that {source.path} does not hold, or holds more than "
            f"once, such as {names[samples.index(None)]!r}; name them by their number from 0 to "
            f"{len(source) - 1}, or by the end of their path."
        )
    twice = [sample for sample, count in Counter(samples).items() if count > 1]
    if twice:
        raise DataError(f"The attributes {path} have two rows about {source.name(twice[0])}; remove one.")
    return samples


def _ends(source: Source, slashes: set[int]) -> dict[str, int | None]:
    """Samples by the ends of their names with that many slashes; None where several share one."""
    found: dict[str, int | None] = {}
    for index in range(len(source)):
        parts = source.name(index).split("/")
        for count in slashes:
            end = "/".join(parts[-count - 1 :])
            found[end] = index if end not in found else None
    return found


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _brightness(drawn: Drawn, index: int) -> float:
    """0 to 255, of the image reduced to at most 64 pixels a side."""
    image = read_image(drawn, index)
    image.thumbnail((64, 64))
    return float((np.asarray(image, dtype=float) @ BRIGHTNESS_WEIGHTS).mean())


def _num_bytes(drawn: Drawn, index: int) -> float:
    return np.nan if drawn.pixels(index) is not None else float(len(drawn.encoded(index)))
