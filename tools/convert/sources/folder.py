"""Images in a folder: one sub-folder per class, or no labels at all."""

import os
import stat
from array import array
from errno import EINVAL, ELOOP
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import DataError
from tools.convert.compiled import read_files
from tools.convert.sources.base import ENTRY, NO_LABEL, UNKNOWN, ListedImages, Names, is_image_name, printable

# Parts of a data set; a folder that holds nothing else is not a folder of classes.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class FolderImages(ListedImages):
    """Files below a folder; symbolic links are followed."""

    def __init__(self, *arguments: Any, **columns: Any) -> None:
        super().__init__(*arguments, **columns)
        self._changed = array("q")  # what `_changes` has found

    def size(self, index: int) -> int:
        if self.entries_N["size"][index] == UNKNOWN:
            self._look_at(index)
        return super().size(index)

    def fingerprint(self) -> str:
        self._changes()  # looks at all files
        return super().fingerprint()

    def _changes(self) -> array:
        if len(self._changed) != len(self):
            self._changed = array("q", map(self._look_at, range(len(self))))
        return self._changed

    def _look_at(self, index: int) -> int:
        """Note the size of a file; returns when it was last changed."""
        try:
            status = os.stat(self._file(index))  # noqa: PTH116 (a `Path` costs more)
        except OSError:  # reading it will tell
            self.entries_N["size"][index] = 0
            return UNKNOWN
        self.entries_N["size"][index] = status.st_size
        return status.st_mtime_ns

    def _read(self, index: int) -> bytes:
        # Without blocking: opening a pipe would wait for ever.
        descriptor = os.open(self._file(index), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(EINVAL, "not a file")
            return file.read()

    def _read_together(
        self,
        entries: range,
        size_N: np.ndarray,
        is_wanted_N: np.ndarray,
        out_B: np.ndarray,
        is_read_N: np.ndarray,
    ) -> None:
        paths = b"".join(self._file(index) + b"\0" for index in entries)
        read_files(np.frombuffer(bytearray(paths), np.uint8), size_N, is_wanted_N, out_B, is_read_N)

    def _file(self, index: int) -> bytes:
        return os.fsencode(self.path) + b"/" + self.raw_name(index)


def list_folder(path: Path, *, unlabelled: bool) -> FolderImages:
    """The images below `path`, which is a folder.

    Where `path` holds sub-folders, each is a class, in the order of torchvision's `ImageFolder`: class by
    class, then by the folder's path, then by name. Where it holds images, or with `unlabelled`, all images
    at any depth come without labels, in the order of folder path and name.

    Raises `DataError` where it holds both and `unlabelled` does not say what is meant, or where the
    sub-folders are the parts of a data set; `OSError` for folders that cannot be read.
    """
    classes, has_images = [], False
    with os.scandir(path) as found:
        for entry in found:
            if is_folder(entry):
                classes.append(entry.name)
            else:
                has_images = has_images or is_image_name(os.fsencode(entry.name))
    classes.sort()
    if not unlabelled:
        if has_images and classes:
            raise DataError(
                f"The folder {printable(path)} holds images and also sub-folders such as "
                f"{printable(classes[0])}; put them all into one sub-folder per class, or pass --unlabelled."
            )
        refuse_parts(classes, path)
    tops = [""] if unlabelled or has_images else classes
    folders: list[str] = []
    listings: list[bytes] = []
    columns = {"folder": array("i"), "label": array("i")}
    ignored = 0
    for label, top in enumerate(tops):
        files, others = _files_below(str(path), top)
        ignored += others
        for folder, names in sorted(files.items()):
            count = names.count(b"\0")
            columns["folder"].extend([len(folders)] * count)
            columns["label"].extend([NO_LABEL if tops == [""] else label] * count)
            folders.append(folder)
            listings.append(names)
    entries_N = np.zeros(len(columns["folder"]), ENTRY)
    entries_N["size"] = UNKNOWN
    for name, column in columns.items():
        entries_N[name] = column
    return FolderImages(
        "image folder" if tops != [""] else "folder of images without labels",
        path,
        classes=[] if tops == [""] else tops,
        folders=[os.fsencode(folder) for folder in folders],
        names=Names(b"".join(listings)),
        entries_N=entries_N,
        ignored=ignored,
    )


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Links are followed; one that leads to itself is no folder. Raises `OSError`."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == ELOOP:
            return False
        raise


def refuse_parts(classes: list[str], path: Path) -> None:
    """Raise `DataError` where what look like classes are the parts of a data set."""
    if classes and {name.lower() for name in classes} <= PARTS:
        raise DataError(
            f"{printable(path)} holds the parts {', '.join(classes)} of a data set, not classes; "
            f"convert each alone, such as {printable(path / classes[0])}."
        )


def _files_below(root: str, top: str) -> tuple[dict[str, bytes], int]:
    """The sorted image names, each with a zero byte after it, of `root`/`top` and each folder below it.

    The keys are paths relative to `root`. Also returns how many other files there are. Raises `DataError`
    for a symbolic link that leads back to a folder above it.
    """
    found: dict[str, bytes] = {}
    ignored = 0
    stack = [(top, _identity(os.path.join(root, top)), ())]  # noqa: PTH118 (text with any bytes in it)
    while stack:
        folder, identity, above = stack.pop()
        names = []
        with os.scandir(f"{root}/{folder}" if folder else root) as entries:
            for entry in entries:
                inner = f"{folder}/{entry.name}" if folder else entry.name
                if is_folder(entry):
                    inner_identity = _identity(entry.path)
                    if inner_identity in (identity, *above):
                        raise DataError(
                            f"The link {printable(entry.path)} leads back to a folder above it; remove it."
                        )
                    stack.append((inner, inner_identity, (identity, *above)))
                elif is_image_name(os.fsencode(entry.name)):
                    names.append(entry.name)
                else:
                    ignored += 1
        if names:
            names.sort()
            found[folder] = os.fsencode("\0".join(names) + "\0")
    return found, ignored


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116
    return status.st_dev, status.st_ino
