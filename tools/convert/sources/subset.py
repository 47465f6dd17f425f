"""The part of the images that a list names."""

from pathlib import Path

import numpy as np

from pipelines.errors import DataError
from tools.convert.sources.base import ListedImages


def keep_subset(images: ListedImages, file: Path) -> None:
    """Keep the images that the lines of `file` name, in their order in `images`; classes stay as they are.

    A line is a file name with or without its folder and with or without its ending, such as
    `n01440764_10183.JPEG` in SimCLR's lists. Raises `DataError` for lines that name no image or several,
    and `OSError`.
    """
    lines = [line.strip() for line in file.read_bytes().splitlines()]
    wanted = {line: number for number, line in enumerate(lines, start=1) if line}
    hits = dict.fromkeys(wanted, 0)
    kept = []
    for index in range(len(images)):
        path = images.raw_name(index).replace(b".tar/", b"/")
        name = images.names[index]
        forms = {path, name, path.rpartition(b".")[0], name.rpartition(b".")[0]}
        found = [form for form in forms if form in wanted]
        for form in found:
            hits[form] += 1
        if found:
            kept.append(index)
    for line, count in hits.items():
        if count != 1:
            shown = line.decode("utf-8", "backslashreplace")
            fault = "names no image" if not count else f"names {count} images"
            advice = "correct it" if not count else "give its class folder too"
            raise DataError(f"Line {wanted[line]} of {file}, '{shown}', {fault} in {images.path}; {advice}.")
    if not kept:
        raise DataError(f"The list {file} is empty; write one file name on each line.")
    images.keep(np.array(kept))
