"""Data sets as published, by their own lists of images."""

import os
from pathlib import Path

import numpy as np

from pipelines.source import open_layout
from tools.convert.sources.base import ENTRY, UNKNOWN, Names
from tools.convert.sources.folder import FolderImages


def list_layout(path: Path) -> FolderImages:
    """The images of `path`, such as `places205:/data/places205:val`, in the order of the published list.

    Raises `DataError`; see `pipelines.source.layouts`.
    """
    source = open_layout(path)
    root = Path(str(path).split(":")[1])
    files = [os.fsencode(source.name(index)) for index in range(len(source))]
    parts = [file.removeprefix(os.fsencode(root) + b"/").rpartition(b"/") for file in files]
    places: dict[bytes, int] = {}
    entries_N = np.zeros(len(files), ENTRY)
    entries_N["folder"] = [places.setdefault(folder, len(places)) for folder, _, _ in parts]
    entries_N["label"] = source.labels_N
    entries_N["size"] = UNKNOWN
    return FolderImages(
        f"published layout {str(path).partition(':')[0]}",
        root,
        classes=source.classes,
        folders=list(places),
        names=Names(b"".join(name + b"\0" for _, _, name in parts)),
        entries_N=entries_N,
        ignored=0,
    )
