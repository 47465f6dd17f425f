"""Whether a dataset is still what was written: every byte is compared with the manifest's checksums."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from pipelines.errors import DataError
from tools.convert.manifest import Block, Manifest, StoredFile, digest_of, load_manifest, manifest_path
from tools.convert.pool import threads
from tools.convert.recorder import RunningChecksum, path_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Run:
    """Blocks whose checksums start at the same byte: one pass over the file."""

    file: StoredFile
    blocks: tuple[Block, ...]
    first_sample: int  # of the dataset
    bytes: int


def verify(dataset: Path, *, workers: int = 4, progress: Progress | None = None) -> Manifest:
    """Read a `.beton` file or a folder of shards again and compare it with its manifest, which is returned.

    `progress(done, total)`: bytes. Raises `DataError` that names the first damage and the samples in it, also
    where there is no manifest.
    """
    manifest = load_manifest(dataset)
    samples = sum(block.samples for file in manifest.files for block in file.blocks)
    if digest_of(manifest.files) != manifest.sha256 or samples != manifest.images:
        raise DataError(f"The manifest {manifest_path(dataset)} is damaged; copy the dataset again.")
    report = progress or (lambda done, total: None)
    for file in manifest.files:
        _check_size(path_of(dataset, file.file), file)
    runs = list(_runs(manifest))
    total, done = sum(run.bytes for run in runs), 0
    report(done, total)
    with threads(workers) as pool:
        for run, damage in zip(runs, pool.map(partial(_damage, dataset), runs), strict=True):
            if damage:
                raise DataError(damage)
            done += run.bytes
            report(done, total)
    return manifest


def _check_size(path: Path, file: StoredFile) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); copy the dataset again.") from error
    if size != file.bytes:
        raise DataError(
            f"{path} has {size} bytes and not the {file.bytes} that were written; copy the dataset again."
        )


def _runs(manifest: Manifest) -> Iterator[_Run]:
    sample = 0
    for file in manifest.files:
        starts = [0, *(i for i, (a, b) in enumerate(pairwise(file.blocks), 1) if a.start != b.start)]
        for first, last in pairwise([*starts, len(file.blocks)]):
            blocks = file.blocks[first:last]
            yield _Run(file, blocks, sample, blocks[-1].end - blocks[0].start)
            sample += sum(block.samples for block in blocks)


def _damage(dataset: Path, run: _Run) -> str | None:
    """A sentence about the first block of the run that is not what was written."""
    path = path_of(dataset, run.file.file)
    checksum, sample, position = RunningChecksum(path), run.first_sample, run.blocks[0].start
    for block in run.blocks:
        try:
            is_whole = checksum.read("", block.start, block.end) == block.sha256
        except OSError as error:
            return f"{path} cannot be read at byte {position} ({error.strerror}); copy the dataset again."
        if not is_whole:
            what = (
                f"samples {sample} to {sample + block.samples - 1} are" if block.samples else "its index is"
            )
            return (
                f"{path} is damaged: {what} not what was written (bytes {position} to {block.end - 1}); "
                "copy the dataset again or convert the images again."
            )
        sample, position = sample + block.samples, block.end
    return None
