"""Whether a dataset is still what was written: every byte is compared with the manifest's checksums."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from pipelines.errors import DataError
from pipelines.source import open_source
from tools.convert.images import BadImage, prepare
from tools.convert.manifest import (
    MAX_STORED_SIDE,
    Block,
    ConvertSettings,
    Manifest,
    StoredFile,
    digest_of,
    load_manifest,
    manifest_path,
)
from tools.convert.pool import threads
from tools.convert.recorder import RunningChecksum, path_of

MOST_NAMED = 10  # samples
_CHECK = ConvertSettings(max_side=MAX_STORED_SIDE, check="decode")

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
            what = "its index is not what was written"
            if block.samples:
                what = f"samples {sample} to {sample + block.samples - 1} are not what was written"
                if names := _undecodable(dataset, range(sample, sample + block.samples)):
                    what += f", and of these {_listed(names)} cannot be decoded"
            return (
                f"{path} is damaged: {what} (bytes {position} to {block.end - 1}); "
                "copy the dataset again or convert the images again."
            )
        sample, position = sample + block.samples, block.end
    return None


def _undecodable(dataset: Path, samples: range) -> list[int]:
    """Those of the samples whose JPEGs are damaged so that decoding tells; none where nothing can be told."""
    found = []
    try:
        source = open_source(dataset)
        for sample in samples:
            if source.pixels(sample) is None:  # pixels look alike, damaged or not
                try:
                    prepare(source.encoded(sample).tobytes(), _CHECK)
                except BadImage:
                    found.append(sample)
    except (DataError, OSError, ValueError):  # the damage keeps it from being opened
        return []
    return found


def _listed(samples: list[int]) -> str:
    shown = ", ".join(map(str, samples[:MOST_NAMED]))
    return shown + (f" and {len(samples) - MOST_NAMED} others" if len(samples) > MOST_NAMED else "")
