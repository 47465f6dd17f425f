"""Which training images to learn from: lists as files, and balanced draws.

A list has an image per line, as SimCLR's for 1 % and 10 % of ImageNet: the name of its file, such as
n01440764_10026.JPEG, or its path inside the dataset, such as dog/0001.jpg, where names repeat. Where the
dataset holds no names (.beton files, shards), a line is the sample's number, counted from 0.

Shape legend: K samples of the subset.
"""

from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from pipelines.errors import DataError
from pipelines.order import epoch_permutation
from pipelines.source import FolderSource, Source


def read_subset(path: Path, source: Source) -> np.ndarray:
    """int64 (K,): the samples of `source` in the list at `path`, ascending.

    Raises `DataError` where the list is missing or empty, or a line is not found, found twice, or repeated.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise DataError(f"Cannot read the list of images {path} ({reason}); check the path.") from error
    asked = [line.strip() for line in lines if line.strip()]
    if not asked:
        raise DataError(f"The list {path} names no images; write one in each line.")
    repeated, count = Counter(asked).most_common(1)[0]
    if count > 1:
        raise DataError(f"The list {path} names {repeated} {count} times; leave one.")
    places: dict[str, list[int]] = {}
    if not all(map(str.isdecimal, asked)):
        for index, name in enumerate(_names(source, path)):
            places.setdefault(name, []).append(index)
            if "/" in name:
                places.setdefault(PurePosixPath(name).name, []).append(index)
    samples = [_sample(line, places, source, path) for line in asked]
    if len(set(samples)) < len(samples):
        raise DataError(f"The list {path} names an image twice, by its name and by its path; leave one.")
    return np.sort(np.array(samples, dtype=np.int64))


def draw_subset(source: Source, percent: float, seed: int) -> np.ndarray:
    """int64 (K,): `percent` of the samples, as many of each class up to one, ascending; fixed by `seed`.

    Raises `DataError` where that is less than one image for each class, or more than a class has.
    """
    total, classes = round(len(source) * percent / 100), len(source.classes)
    share, rest = divmod(total, classes)
    if share == 0:
        raise DataError(
            f"{percent:g} % of {len(source)} images is {total}, fewer than one for each of {classes} "
            f"classes; take a larger percentage."
        )
    order_N = epoch_permutation(len(source), seed, 0)
    labels_N = source.labels_N[order_N]
    drawn = []
    for place, label in enumerate(epoch_permutation(classes, seed, 1).tolist()):
        of_class = order_N[labels_N == label]
        wanted = share + (place < rest)
        if len(of_class) < wanted:
            raise DataError(
                f"{percent:g} % of the images is {wanted} of the class {source.classes[label]}, which has "
                f"{len(of_class)}; take a smaller percentage, or a list."
            )
        drawn.append(of_class[:wanted])
    return np.sort(np.concatenate(drawn))


def subset_list(source: Source, indices_K: np.ndarray) -> str:
    """The text of a list, from which `read_subset` gives the same samples of the same dataset."""
    if not isinstance(source, FolderSource):
        return "".join(f"{index}\n" for index in indices_K)
    paths = _names(source, None)
    names = [PurePosixPath(path).name for path in paths]
    lines = names if len(set(names)) == len(names) else paths
    return "".join(f"{lines[index]}\n" for index in indices_K)


def _names(source: Source, asked_by: Path | None) -> list[str]:
    """Paths of all samples inside the dataset's folder."""
    if not isinstance(source, FolderSource):
        raise DataError(
            f"The list {asked_by} names files, but {source.path} holds no file names; learn from the folder "
            f"of images instead, or list sample numbers."
        )
    return [Path(source.name(index)).relative_to(source.path).as_posix() for index in range(len(source))]


def _sample(line: str, places: dict[str, list[int]], source: Source, path: Path) -> int:
    if not places:
        if int(line) >= len(source):
            raise DataError(
                f"The list {path} has sample {line}, but {source.path} holds {len(source)}; check that it "
                f"was made for this dataset."
            )
        return int(line)
    found = places.get(line, [])
    if len(found) != 1:
        what = "is not in" if not found else f"is {len(found)} times in"
        remedy = "check that it was made for this dataset" if not found else "write class/name instead"
        raise DataError(f"The image {line} of the list {path} {what} {source.path}; {remedy}.")
    return found[0]
