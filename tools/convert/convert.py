"""An image folder becomes one FFCV dataset file, or nothing at all."""

import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np

from pipelines.errors import DataError
from pipelines.threads import keep_torch_threads
from tools.convert.images import ImageFile, RgbImages, find_faults, list_images, printable
from tools.convert.manifest import ConvertSettings, LeftOut, Manifest, manifest_path, save_manifest

MAX_STORED_SIDE = 4096


def convert(
    source: Path,
    target: Path,
    *,
    max_side: int = 512,
    quality: int = 90,
    workers: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Convert an ImageFolder tree to `target` (a `.beton`) and the manifest beside it.

    1. List the files in the order of torchvision's `ImageFolder`: class by class, then by path.
    2. Decode every image once; those that cannot be decoded are left out, with the reason in the manifest.
    3. Write the others through FFCV's writer under a temporary name: RGB, longer side at most `max_side`
       pixels, JPEG of `quality`. Order, labels and each sample's bytes do not depend on `workers`.
    4. Move dataset and manifest to their names, once they are on the disk.

    `progress(done, total)` runs from 0 to twice the number of files: once for step 2, once for step 3.
    Raises `DataError` for a source without usable images, a target that cannot be written, settings out of
    range, and a worker process that dies. An existing target is replaced, but only by a complete one.
    """
    _check_settings(target, max_side, quality, workers)
    # 1.
    classes, files = list_images(source)
    report = progress or (lambda done, total: None)
    with _part_files(target) as (beton_part, manifest_part):
        # 2.
        faults = find_faults(files, max_side, workers, lambda done: report(done, 2 * len(files)))
        usable = [file for file, fault in zip(files, faults, strict=True) if fault is None]
        left_out = tuple(
            LeftOut(file=printable(Path(file.path).relative_to(source)), reason=fault)
            for file, fault in zip(files, faults, strict=True)
            if fault is not None
        )
        if not usable:
            example = f" ({left_out[0].file}: {left_out[0].reason})" if left_out else ""
            raise DataError(
                f"The image folder {source} holds no usable image in its {len(classes)} classes{example}; "
                "put at least one image into a sub-folder."
            )
        # 3.
        with keep_torch_threads():
            from tools.convert.writer import write_beton

        write_beton(
            RgbImages(usable),
            beton_part,
            max_side=max_side,
            quality=quality,
            workers=min(workers, len(usable)),
            progress=lambda done: report(len(files) + len(left_out) + done, 2 * len(files)),
        )
        manifest = _describe(
            source, classes, usable, left_out, ConvertSettings(max_side=max_side, quality=quality)
        )
        save_manifest(manifest, manifest_part)
        # 4.
        for part, path in ((manifest_part, manifest_path(target)), (beton_part, target)):
            _flush(part)
            part.replace(path)
        _flush(target.parent)
    return manifest


@contextmanager
def _part_files(target: Path) -> Iterator[tuple[Path, Path]]:
    """Temporary names of dataset and manifest, for one conversion at a time; nothing is left there.

    The names are fixed, so that what a killed conversion leaves is overwritten by the next one.
    Raises `DataError` where another conversion holds them, and for every `OSError` in the block.
    """
    beton_part, manifest_part = (
        path.with_name(f".{path.name}.part") for path in (target, manifest_path(target))
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with beton_part.open("ab") as lock:  # fails here rather than after the first pass
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"Another conversion to {target} is running; wait for its end or choose another target."
                ) from error
            except OSError:
                pass  # a file system without locks
            try:
                yield beton_part, manifest_part
            finally:
                beton_part.unlink(missing_ok=True)
                manifest_part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"The dataset cannot be written to {target}: {error.strerror}; "
            "choose another target or free some space."
        ) from error


def _check_settings(target: Path, max_side: int, quality: int, workers: int) -> None:
    """Raise `DataError` for a target that cannot be one and for numbers out of range."""
    if target.suffix != ".beton":
        folder = target if target.is_dir() else target.parent
        raise DataError(
            f"The target {target} must end in .beton; name a file such as {folder / 'dataset.beton'}."
        )
    if target.is_dir():
        raise DataError(f"The target {target} is a folder; choose another name.")
    for name, value, low, high in (
        ("max_side", max_side, 16, MAX_STORED_SIDE),
        ("quality", quality, 1, 100),
        ("workers", workers, 1, 256),
    ):
        if not low <= value <= high:
            raise DataError(
                f"{name} must be between {low} and {high}, not {value}; change it and convert again."
            )


def _describe(
    source: Path,
    classes: list[str],
    usable: list[ImageFile],
    left_out: tuple[LeftOut, ...],
    settings: ConvertSettings,
) -> Manifest:
    counts = np.bincount([file.label for file in usable], minlength=len(classes)).tolist()
    names = tuple(printable(name) for name in classes)
    return Manifest(
        source=printable(source.resolve()),
        created=datetime.now(UTC),
        classes=names,
        images=len(usable),
        images_per_class=dict(zip(names, counts, strict=True)),
        settings=settings,
        versions={
            "fastbarlow": version("fastbarlow"),
            "ffcv": version("ffcv"),
            "pillow": version("pillow"),
            "opencv": cv2.__version__,
            "python": platform.python_version(),
        },
        left_out=left_out,
    )


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
