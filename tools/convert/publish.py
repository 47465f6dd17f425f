"""A finished conversion gets its manifest and its names.

Shape legend: N samples.
"""

import ctypes
import os
import platform
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from errno import EINVAL, ENOSYS, EOPNOTSUPP
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np

from pipelines.errors import DataError
from tools.convert.journal import Record
from tools.convert.manifest import (
    Block,
    ConvertSettings,
    LeftOut,
    Manifest,
    StoredFile,
    digest_of,
    load_manifest,
    manifest_path,
    save_manifest,
    summarise_sizes,
)
from tools.convert.recorder import RunningChecksum, flush
from tools.convert.sources import ImageSet
from tools.convert.target import Written

_ANYWHERE, _EXCHANGE = -100, 2  # AT_FDCWD: of no account for absolute paths; RENAME_EXCHANGE


def software() -> dict[str, str]:
    """Versions of what the bytes of a dataset depend on."""
    return {
        "fastbarlow": version("fastbarlow"),
        "pillow": version("pillow"),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
        "python": platform.python_version(),
    }


def part_path(target: Path) -> Path:
    """The temporary name of a dataset's file or folder. It is fixed, so that a resume finds it."""
    return target.with_name(f".{target.name}.part")


def old_path(target: Path) -> Path:
    """Where a folder of shards is once another one has its name, until it is removed."""
    return target.with_name(f".{target.name}.old")


def check_replaceable(target: Path) -> None:
    """Raise `DataError` unless a folder `target` is empty or holds a dataset of shards and nothing else."""
    names = {path.name for path in target.iterdir()} if target.is_dir() else {""}
    if not names:
        return
    try:
        own = {"manifest.json", *(file.file for file in load_manifest(target).files)}
    except DataError:
        own = set()
    if names != own or not all((target / name).is_file() for name in names):
        raise DataError(
            f"The target {target} exists and is no dataset of shards, or holds other files too; "
            "name a new folder."
        )


def stored_files(
    records: Iterable[Record], finish: Iterable[Written], checksum: RunningChecksum, final_name: str | None
) -> tuple[StoredFile, ...]:
    """The files that these records and `Target.finish` make up; `final_name` is that of a single file."""
    blocks = []
    for record in records:
        if record.file:
            place = {"start": record.start, "end": record.end, "sha256": record.sha256}
            blocks.append((record.file, Block(samples=len(record.samples_N), **place)))
    for written in finish:
        block = Block(start=written.start, end=written.end, samples=0, sha256=checksum.add(written))
        blocks.append((written.file, block))
    blocks.sort(key=lambda pair: (pair[0], pair[1].start, pair[1].end))
    files = []
    for name, group in groupby(blocks, key=lambda pair: pair[0]):
        of_file = tuple(block for _, block in group)
        is_whole = not any(block.start for block in of_file)
        files.append(
            StoredFile(
                file=final_name or name,
                bytes=of_file[-1].end,
                samples=sum(block.samples for block in of_file),
                sha256=of_file[-1].sha256 if is_whole else None,
                blocks=of_file,
            )
        )
    return tuple(files)


def describe(
    images: ImageSet,
    fingerprint: str,
    settings: ConvertSettings,
    records: list[Record],
    files: tuple[StoredFile, ...],
    seconds: float,
) -> Manifest:
    """The manifest of a dataset with at least one sample."""
    samples_N = np.concatenate([record.samples_N for record in records])
    classes = tuple(images.classes)
    counts = np.bincount(np.maximum(samples_N["label"], 0), minlength=len(classes)).tolist()
    return Manifest(
        source=str(images.path.resolve()),
        source_kind=images.description,
        source_fingerprint=fingerprint,
        created=datetime.now(UTC),
        seconds=round(seconds, 3),
        settings=settings,
        versions=software(),
        sha256=digest_of(files),
        images=len(samples_N),
        images_copied=int(samples_N["was_copied"].sum()),
        images_raw=int(samples_N["is_raw"].sum()),
        image_bytes=int(samples_N["size"].sum(dtype=np.int64)),
        sizes=summarise_sizes(samples_N["height"], samples_N["width"]),
        unlabelled=not classes,
        classes=classes,
        images_per_class=dict(zip(classes, counts, strict=False)),
        left_out=tuple(LeftOut(file=name, reason=why) for record in records for name, why in record.left_out),
        ignored=images.ignored,
        files=files,
    )


def publish(manifest: Manifest, target: Path) -> None:
    """Write the manifest, wait until everything is on the disk, and give the dataset its name.

    Raises `OSError`, and `DataError` for a folder in its place that is not to be replaced.
    """
    part, old = part_path(target), old_path(target)
    if part.is_dir():
        save_manifest(manifest, manifest_path(part))
        flush(*part.iterdir(), part)
        shutil.rmtree(old, ignore_errors=True)
        if not target.is_dir():
            part.rename(target)
        else:
            check_replaceable(target)  # again: it may have been filled since
            if _exchange(part, target):
                part.rename(old)
            else:
                target.rename(old)
                part.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    else:
        manifest_part = part_path(manifest_path(target))
        save_manifest(manifest, manifest_part)
        flush(part, manifest_part)
        # Whatever stops this, the data never lies beside a manifest that is not its own.
        manifest_path(target).unlink(missing_ok=True)
        flush(target.parent)
        part.replace(target)
        flush(target.parent)
        manifest_part.replace(manifest_path(target))
    flush(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Give each of two folders the other's name, in one step; false where the system knows no such step.

    Raises `OSError`. Source: `renameat2` of Linux.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = os.fsencode(first.absolute()), os.fsencode(second.absolute())
    if not rename(_ANYWHERE, names[0], _ANYWHERE, names[1], _EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (ENOSYS, EINVAL, EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def remove_part(target: Path) -> None:
    """Remove what an unfinished conversion has left. Raises `OSError`."""
    part = part_path(target)
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)
    part_path(manifest_path(target)).unlink(missing_ok=True)
