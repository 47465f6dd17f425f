"""Images inside tar archives, read where they lie: ImageNet's archives as downloaded, or shards.

Only headers are read to list them: the images themselves are read from the archive by offset.
"""

import json
import os
import re
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from errno import EINVAL, EIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import DataError
from tools.convert.compiled import read_parts
from tools.convert.sources.base import (
    ENTRY,
    NO_LABEL,
    NOT_A_FILE,
    ListedImages,
    Names,
    is_image_name,
    printable,
)
from tools.convert.sources.folder import refuse_parts
from tools.convert.sources.labels import from_words
from tools.convert.sources.tar_index import Member, members

INDEX_THREADS = 16  # an archive's headers lie far apart: most of the time is waiting for the disk
MAX_LABEL_BYTES = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_SYNSET = re.compile(r"n\d{8}")


class TarImages(ListedImages):
    """Files in archives."""

    def __init__(self, description: str, path: Path, archives: Sequence[Path], **columns: Any) -> None:
        super().__init__(description, path, **columns)
        self._archives = archives
        self._opened = threading.local()  # each thread keeps the archive open that it read from last

    def _read(self, index: int) -> bytes:
        entry = self.entries_N[index]
        if entry["offset"] == NOT_A_FILE:
            raise OSError(EINVAL, "a link inside an archive, not a file")
        size = int(entry["size"])
        data = os.pread(self._descriptor(int(entry["archive"])), size, int(entry["offset"]))
        if len(data) < size:
            raise OSError(EIO, "the archive was cut short")
        return data

    def _read_together(
        self,
        entries: range,
        size_N: np.ndarray,
        is_wanted_N: np.ndarray,
        out_B: np.ndarray,
        is_read_N: np.ndarray,
    ) -> None:
        of_entries = self.entries_N[entries.start : entries.stop]
        offset_N, archive_N = np.ascontiguousarray(of_entries["offset"]), of_entries["archive"]
        starts_N = np.cumsum(size_N) - size_N
        edges = [0, *(np.flatnonzero(np.diff(archive_N)) + 1).tolist(), len(entries)]
        for first, last in pairwise(edges):  # of one archive each
            try:
                descriptor = self._descriptor(int(archive_N[first]))
            except OSError:  # reading one alone will tell
                continue
            run = slice(first, last)
            is_wanted = is_wanted_N[run] & (offset_N[run] != NOT_A_FILE)
            read_parts(
                descriptor, offset_N[run], size_N[run], is_wanted, out_B[starts_N[first] :], is_read_N[run]
            )

    def _descriptor(self, number: int) -> int:
        """Of an archive, for this thread."""
        if getattr(self._opened, "number", None) != number:
            self._opened.file = _OpenFile(self._archives[number])
            self._opened.number = number
        return self._opened.file.descriptor


class _OpenFile:
    """A file descriptor that closes with its last reference."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@dataclass
class _Listing:
    """The images of one archive, in its order; columns as in `ENTRY`."""

    folders: dict[bytes, int] = field(default_factory=dict)
    folder: array = field(default_factory=lambda: array("i"))
    names: bytearray = field(default_factory=bytearray)
    offset: array = field(default_factory=lambda: array("q"))
    size: array = field(default_factory=lambda: array("q"))
    words: dict[str, int] = field(default_factory=dict)  # labels from files beside the images
    word: array = field(default_factory=lambda: array("i"))  # position in `words`, or NO_LABEL
    ignored: int = 0

    def add(self, member: Member, prefix: bytes) -> None:
        folder, _, name = (prefix + member.path).rpartition(b"/")
        self.folder.append(self.folders.setdefault(folder, len(self.folders)))
        self.names += name + b"\0"
        self.offset.append(member.offset if member.is_file else NOT_A_FILE)
        self.size.append(member.size)
        self.word.append(NO_LABEL)


def is_compressed(path: Path) -> str | None:
    """The compression of a file, or None."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((name for mark, name in _COMPRESSED.items() if start.startswith(mark)), None)


def list_archive(path: Path, *, unlabelled: bool) -> TarImages:
    """The images in one archive. Raises `DataError` where it is damaged, and `OSError`.

    - An archive of class archives (`ILSVRC2012_img_train.tar`): the inner archives are the classes.
    - Images with a label file beside each (WebDataset, `key.jpg` with `key.cls` or `key.json`): those labels,
      in the archive's order.
    - Images in folders: the folders below the first common one are the classes.
    - Otherwise (`ILSVRC2012_img_val.tar`) there are no labels.

    All but WebDataset come in the order that `list_folder` gives the unpacked files.
    """
    with path.open("rb") as file:
        first = next(members(file.fileno(), str(path)), None)
        is_nested = first is not None and first.path.endswith(b".tar")
        inner = list(members(file.fileno(), str(path))) if is_nested else []
    if is_nested:
        inner = sorted(
            (member for member in inner if member.path.endswith(b".tar")),
            key=lambda member: os.fsdecode(member.path),
        )
        classes = [os.fsdecode(member.path).rpartition("/")[2].removesuffix(".tar") for member in inner]
        regions = [(path, f"{path} ({printable(member.path)})", member) for member in inner]
        return _assemble("archive of class archives", path, [path], regions, classes, unlabelled=unlabelled)
    return _assemble("tar archive", path, [path], [(path, str(path), None)], None, unlabelled=unlabelled)


def list_shards(path: Path, archives: Sequence[Path], *, unlabelled: bool) -> TarImages:
    """The images in several archives, named by `path`; labels as in `list_archive`, order as in the archives.

    Archives that are all named like ImageNet's class archives are the classes, and their images are sorted.
    """
    is_by_class = all(_SYNSET.fullmatch(archive.stem) for archive in archives)
    if is_by_class:
        archives = sorted(archives, key=lambda archive: archive.stem)
    stems = [archive.stem for archive in archives]
    regions = [(archive, str(archive), None) for archive in archives]
    description = "folder of class archives" if is_by_class else "tar shards"
    return _assemble(
        description, path, archives, regions, stems if is_by_class else None, unlabelled=unlabelled
    )


def _assemble(
    description: str,
    path: Path,
    archives: Sequence[Path],
    regions: Sequence[tuple[Path, str, Member | None]],
    classes: list[str] | None,
    *,
    unlabelled: bool,
) -> TarImages:
    """One table from the listings of all `regions`; `classes` names one class for each region.

    1. List the regions, several at a time.
    2. Join their tables; folders get common numbers.
    3. Find the labels.
    4. Sort, unless the order is the archives'.
    """
    # 1.
    with ThreadPoolExecutor(min(INDEX_THREADS, len(regions))) as pool:
        listings = list(pool.map(lambda region: _list_region(*region, has_many=len(archives) > 1), regions))
    # 2.
    folders: dict[bytes, int] = {}
    entries_N = np.zeros(sum(len(listing.offset) for listing in listings), ENTRY)
    words_N = np.full(len(entries_N), NO_LABEL, np.int32)
    words: dict[str, int] = {}
    start = 0
    for number, listing in enumerate(listings):
        part = slice(start, start := start + len(listing.offset))
        folder_numbers = [folders.setdefault(folder, len(folders)) for folder in listing.folders]
        word_numbers = [words.setdefault(word, len(words)) for word in listing.words]
        entries_N["folder"][part] = np.array(folder_numbers, np.int32)[np.array(listing.folder, np.int32)]
        entries_N["offset"][part], entries_N["size"][part] = listing.offset, listing.size
        entries_N["archive"][part] = number if len(archives) > 1 else 0
        entries_N["label"][part] = number
        words_N[part] = np.array([*word_numbers, NO_LABEL], np.int32)[np.array(listing.word, np.int32)]
    names = Names(b"".join(listing.names for listing in listings))
    # 3.
    is_sorted = not words and (len(archives) == 1 or classes is not None)
    if unlabelled:
        classes = []
    elif words:
        classes, labels_W = from_words(list(words), f"The label files in {path}")
        labels_N = np.append(labels_W, NO_LABEL)[words_N]
    elif classes is None:
        inside = [folder.partition(b"/")[2] for folder in folders] if len(archives) > 1 else list(folders)
        classes, labels_F = _classes_of_folders(inside, path)
        labels_N = labels_F[entries_N["folder"]]
    else:
        labels_N = entries_N["label"]
    entries_N["label"] = labels_N if classes else NO_LABEL
    images = TarImages(
        description,
        path,
        archives,
        classes=classes,
        folders=list(folders),
        names=names,
        entries_N=entries_N,
        ignored=sum(listing.ignored for listing in listings),
    )
    # 4.
    if is_sorted:
        _sort(images)
    return images


def _list_region(path: Path, shown: str, inner: Member | None, *, has_many: bool) -> _Listing:
    """The images of an archive, or of the archive `inner` inside it, and the labels beside them."""
    listing = _Listing()
    prefix = inner.path + b"/" if inner else os.fsencode(path.name) + b"/" if has_many else b""
    start, end = (inner.offset, inner.offset + inner.size) if inner else (0, None)
    with path.open("rb") as file:
        current, first, labels = None, 0, {}
        for member in members(file.fileno(), shown, start, end):
            folder, slash, name = member.path.rpartition(b"/")
            stem, _, ending = name.partition(b".")
            key = folder + slash + stem
            if key != current:  # WebDataset: files of one sample follow each other
                _set_word(listing, first, labels, shown)
                current, first, labels = key, len(listing.offset), {}
            if is_image_name(name):
                listing.add(member, prefix)
            elif ending in (b"cls", b"json") and member.is_file and member.size <= MAX_LABEL_BYTES:
                labels[ending] = os.pread(file.fileno(), member.size, member.offset)
            else:
                listing.ignored += 1
        _set_word(listing, first, labels, shown)
    return listing


def _set_word(listing: _Listing, first: int, labels: dict[bytes, bytes], archive: str) -> None:
    """Give the images from `first` on the label that the files beside them state, if they do."""
    if not labels or first == len(listing.offset):
        return
    try:
        if b"cls" in labels:
            word = labels[b"cls"].decode().strip()
        else:
            content = json.loads(labels[b"json"])
            stated = content.get("label", content.get("cls")) if isinstance(content, dict) else None
            word = "" if stated is None else str(stated).strip()
    except ValueError as error:
        name = Names(listing.names)[first]
        raise DataError(
            f"The label beside {printable(name)} in {archive} cannot be read; write it as one number or word."
        ) from error
    if word:
        number = listing.words.setdefault(word, len(listing.words))
        for index in range(first, len(listing.offset)):
            listing.word[index] = number


def _classes_of_folders(folders: list[bytes], path: Path) -> tuple[list[str], np.ndarray]:
    """Class names, and the label of each folder: that of its part below what all folders have in common.

    No classes where all images lie in one folder. Raises `DataError` where some lie above the others.
    """
    if len(set(folders)) < 2:
        return [], np.zeros(len(folders), np.int32)
    split = [folder.split(b"/") if folder else [] for folder in folders]
    depth = len(os.path.commonprefix(split))  # noqa: RUF071 (of lists, it compares whole elements)
    if min(map(len, split)) == depth:
        above = printable(min(folders, key=len))
        raise DataError(
            f"{path} holds images in the folder '{above}' and also below it; "
            "unpack and sort them into one folder per class, or pass --unlabelled."
        )
    tops = [os.fsdecode(parts[depth]) for parts in split]
    classes = sorted(set(tops))
    refuse_parts(classes, path)
    position = {name: label for label, name in enumerate(classes)}
    return classes, np.array([position[top] for top in tops], np.int32)


def _sort(images: TarImages) -> None:
    """By class, then by folder, then by name, as text."""
    texts = [os.fsdecode(folder) for folder in images.folders]
    rank_F = np.empty(len(texts), np.int64)
    rank_F[sorted(range(len(texts)), key=texts.__getitem__)] = np.arange(len(texts))
    rank_N = rank_F[images.entries_N["folder"]]
    order_N = np.lexsort((rank_N, images.entries_N["label"]))
    edges = np.flatnonzero(np.diff(rank_N[order_N])) + 1
    for group in np.split(order_N, edges):  # a view: sorted in place, folder by folder
        group[:] = sorted(group.tolist(), key=lambda index: os.fsdecode(images.names[index]))
    images.keep(order_N)
