"""The part of the images that a list names.

Shape legend: N images.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipelines.errors import DataError
from tools.convert.sources.base import ListedImages, printable


def keep_subset(images: ListedImages, file: Path) -> None:
    """Keep the images that the lines of `file` name, in their order in `images`; classes stay as they are.

    A line is a file name with or without its folder and with or without its ending, such as
    `n01440764_10183.JPEG` in SimCLR's lists. Raises `DataError` for lines that name no image or several,
    and `OSError`.
    """
    lines = [line.strip() for line in file.read_bytes().splitlines()]
    wanted = {line: number for number, line in enumerate(lines, start=1) if line}
    if not wanted:
        raise DataError(f"The list {file} is empty; write one file name on each line.")
    found_N = match_names(images, wanted, file)
    used = {name for found in found_N for name in found}
    for name, line in wanted.items():
        if name not in used:
            raise DataError(
                f"Line {line} of {file}, '{printable(name)}', names no image in {images.path}; correct it."
            )
    images.keep(np.array([index for index, found in enumerate(found_N) if found]))


def match_names(images: ListedImages, wanted: Mapping[bytes, int], file: Path) -> list[tuple[bytes, ...]]:
    """For each image the names among `wanted` that are its own; `wanted` gives their lines in `file`.

    A name is the image's path or its file name, each with or without its (last) ending. Raises `DataError`
    for one that fits several images.
    """
    hits = dict.fromkeys(wanted, 0)
    found_N = []
    for index in range(len(images)):
        path = images.raw_name(index).replace(b".tar/", b"/")
        name = images.names[index]
        forms = {path, name, path.rpartition(b".")[0], name.rpartition(b".")[0]}
        found = tuple(form for form in forms if form in wanted)
        for form in found:
            hits[form] += 1
        found_N.append(found)
    for name, count in hits.items():
        if count > 1:
            raise DataError(
                f"Line {wanted[name]} of {file}, '{printable(name)}', names {count} images in {images.path}; "
                "give its folder and ending too."
            )
    return found_N
