"""Files that are either whole or not there at all."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from train.errors import TrainingError


def write_atomically(path: Path, write: Callable[[BinaryIO], None], keep: Path | None = None) -> None:
    """Replace `path` by what `write` puts into the file it is given; survives a crash at any moment.

    1. write beside it  2. flush to the disk  3. rename over it  4. flush the folder's entry
    Errors of `write` and `OSError` pass through, and nothing stays beside `path`. Up to step 3 `path` still
    holds what it held before, and from then on `keep` does, if given (without hard links from just before
    step 3); where only step 4 fails, `path` holds the new content.
    """
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            write(file)  # 1
            file.flush()  # 2
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _give_second_name(path, keep)
        beside.replace(path)  # 3
    except BaseException:
        with contextlib.suppress(OSError):  # such as where a parent of the path is a file
            beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # 4
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def preparing(run_dir: Path) -> Iterator[None]:
    """Turns an `OSError` of writing the first files of a run into a `TrainingError`."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot write to run_dir {run_dir}: {error.strerror}; free it or choose another."
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """The same for text, as UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def _give_second_name(path: Path, other: Path) -> None:
    """Replace `other` by the file at `path`, which also stays where it is if the file system can do that."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:  # it has no hard links
        path.replace(other)
