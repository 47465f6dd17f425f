"""Files that are either whole or not there at all."""

import contextlib
import os
import tempfile
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
    _flush_folder(path.parent)  # 4


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """The same for what must be read again before it may take the place of `path`.

    1. gives a path of the same name in a folder of its own, for the block to write and read
    2. flush the file to the disk  3. rename  4. flush the folder's entry
    Errors of the block and `OSError` pass through; up to step 3 `path` holds what it held before.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        place = Path(folder) / path.name
        yield place  # 1
        with place.open("rb") as file:
            os.fsync(file.fileno())  # 2
        place.replace(path)  # 3
    _flush_folder(path.parent)  # 4


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


def root_cause(error: BaseException) -> str:
    """The operating system's words where it is at the root of `error`, such as 'No space left on device'."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _give_second_name(path: Path, other: Path) -> None:
    """Replace `other` by the file at `path`, which also stays where it is if the file system can do that."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:  # it has no hard links
        path.replace(other)
