"""A set of images becomes one dataset: complete, in the source's order, and resumable until then."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from tools.convert import blocks
from tools.convert.beton import BetonTarget
from tools.convert.estimate import Estimate, estimate
from tools.convert.interrupt import single_interrupt
from tools.convert.journal import Journal, open_journal
from tools.convert.manifest import ConvertSettings, Manifest
from tools.convert.pool import Memory, chunks, in_order, prepare_entries, threads
from tools.convert.publish import (
    check_replaceable,
    describe,
    old_path,
    part_path,
    publish,
    remove_part,
    software,
    stored_files,
)
from tools.convert.recorder import Recorder, RunningChecksum, flush, intact_records
from tools.convert.shards import SAMPLES_PER_SHARD, ShardTarget
from tools.convert.sources import ImageSet, open_image_set, printable
from tools.convert.target import Target


@single_interrupt()
def convert(
    source: Path,
    target: Path,
    *,
    settings: ConvertSettings | None = None,
    shards: int | None = None,
    subset: Path | None = None,
    ground_truth: Path | None = None,
    unlabelled: bool = False,
    workers: int = 8,
    resume: bool = True,
    on_estimate: Callable[[Estimate], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Convert what `open_image_set` finds at `source` into a dataset and its manifest.

    `target`: a file `x.beton`, or else a folder for tar shards, `shards` of them or one per
    `SAMPLES_PER_SHARD` entries. `subset`, `ground_truth`, `unlabelled`: see `open_image_set`. `workers`:
    threads; the dataset does not depend on them. `resume`: go on with what an interrupted conversion of the
    same source with the same settings has left; the dataset is then the same, byte for byte, as without the
    interruption. `progress(done, total)`: entries of the source.

    1. List the source.
    2. Take the target for this process; go on where an earlier conversion stopped, or begin.
    3. Estimate time and size by a trial.
    4. Prepare the images on threads, and write them in order, block by block, into files with temporary
       names; what cannot be read or decoded is left out, with the reason in the manifest.
    5. Complete the files, write the manifest, wait for the disk, give them their names.

    Whatever stops it, and Ctrl-C as often as it is pressed, nothing is under the final name before step 5;
    what was there stays. The finished blocks stay beside it for the next call. Raises `DataError` for a
    source without usable images, a target that cannot be written, is too small or in use, holds anything
    else or the source, remains of another conversion, and settings that exclude each other.
    """
    settings = settings or ConvertSettings()
    with _explained(target):
        _check_target(source, target, settings, shards, workers)
        if target.suffix != ".beton":
            target = target.resolve()  # a link stays, and leads to the dataset
        _check_apart(target, [path for path in (source, subset, ground_truth) if path is not None])
    images = open_image_set(source, ground_truth=ground_truth, subset=subset, unlabelled=unlabelled)  # 1
    with _explained(target):
        _check_apart(target, images.archives)
    fingerprint = images.fingerprint()
    if shards is None:
        shards = -(-len(images) // SAMPLES_PER_SHARD)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_journal(target) as journal:
            try:
                checksum = RunningChecksum(part_path(target))
                head = _head(images, fingerprint, settings, target, shards)
                _begin(journal, head, target, checksum, resume)  # 2
                with (
                    closing(_open_target(target, len(images), shards, settings)) as writer,
                    Recorder(journal, writer.part, checksum) as recorder,
                ):
                    _fill(writer, recorder, journal, images, settings, workers, on_estimate, progress)
                    final_name = target.name if writer.part.is_file() else None  # 5
                    files = stored_files(journal.records, writer.finish(), checksum, final_name)
                    manifest = describe(
                        images, fingerprint, settings, journal.records, files, recorder.seconds
                    )
                publish(manifest, target)
                journal.remove()
            finally:
                if not journal.records and not journal.is_foreign:  # nothing to go on with
                    remove_part(target)
                    journal.remove()
    return manifest


def _begin(
    journal: Journal, head: dict[str, Any], target: Path, checksum: RunningChecksum, resume: bool
) -> None:
    """Cut the journal down to what the files hold, or start it anew with no files."""
    if resume and part_path(target).exists():  # otherwise it was killed with all done but the journal's end
        known = journal.head or {}
        differing = [key for key, value in head.items() if known.get(key) != value]
        if journal.is_foreign:
            differing = ["versions"]
        if differing and (journal.records or journal.is_foreign):
            raise DataError(
                f"An unfinished conversion to {target} differs from this one in its "
                f"{' and '.join(differing)}; convert as before to go on with it, or add --no-resume to "
                "begin anew."
            )
        if not differing and (intact := intact_records(journal, part_path(target), checksum)):
            journal.keep(intact)
            return
    remove_part(target)
    journal.start(head)


def _fill(
    writer: Target,
    recorder: Recorder,
    journal: Journal,
    images: ImageSet,
    settings: ConvertSettings,
    workers: int,
    on_estimate: Callable[[Estimate], None] | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Phases 3 and 4 of `convert`."""
    for record in journal.records:
        writer.restore(record.samples_N, record.ends_file)
    writer.truncate()
    done, total = journal.records[-1].entries if journal.records else 0, len(images)
    report = progress or (lambda done, total: None)
    job = partial(prepare_entries, images, settings, writer.max_sample_bytes, Memory())
    with threads(workers) as pool:
        known = estimate(done, total, job, writer, pool)  # 3
        if on_estimate:
            on_estimate(known)
        report(done, total)
        results = in_order(pool, workers, job, chunks(images, settings, done, total))  # 4
        blocks.write_blocks(results, done, images, writer, recorder, lambda done: report(done, total))
    # While the last checksums are made.
    flush(*(writer.part.iterdir() if writer.part.is_dir() else [writer.part]))
    recorder.wait()
    if not any(len(record.samples_N) for record in journal.records):
        left_out = [entry for record in journal.records for entry in record.left_out]
        example = f" ({left_out[0][0]}: {left_out[0][1]})" if left_out else ""
        journal.records.clear()
        raise DataError(f"{images.path} holds no usable image{example}; put at least one there.")


def _head(
    images: ImageSet, fingerprint: str, settings: ConvertSettings, target: Path, shards: int
) -> dict[str, Any]:
    """What must be the same for a conversion to go on. The keys name it in a message."""
    layout = "beton" if target.suffix == ".beton" else f"{shards} shards"
    return {
        "source": [fingerprint, images.identity()],
        "settings": settings.model_dump(mode="json"),
        "target": {"layout": layout, "block": [blocks.ENTRIES, blocks.BYTES]},
        "versions": software(),
    }


def _open_target(target: Path, num_entries: int, shards: int, settings: ConvertSettings) -> Target:
    part = part_path(target)
    if target.suffix == ".beton":
        return BetonTarget(part, num_entries, settings.max_side)
    return ShardTarget(part, num_entries, shards)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Raises `DataError` for every `OSError` in the block; the source's own do not get here."""
    try:
        yield
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT, EFBIG):
            remedy = "free some space, then run the same command again: it goes on where this one stopped"
        else:
            remedy = "check the folder and its permissions, or choose another target"
        raise DataError(f"The dataset cannot be written to {target} ({error.strerror}); {remedy}.") from error


def _check_apart(target: Path, read: Iterable[Path]) -> None:
    """Raise `DataError` where something that is read lies in what the dataset replaces."""
    for place in (target, part_path(target), old_path(target)):
        for path in read:
            if path.resolve().is_relative_to(place.resolve()):
                raise DataError(
                    f"{printable(path)} lies inside {place}, which the dataset would replace; "
                    "choose another target."
                )


def _check_target(
    source: Path, target: Path, settings: ConvertSettings, shards: int | None, workers: int
) -> None:
    """Raise `DataError` for a target that cannot be one, and for settings that do not go with it."""
    is_beton = target.suffix == ".beton"
    if not is_beton and (target.suffix or not target.name):
        folder = target if target.is_dir() else target.parent
        raise DataError(
            f"The target {target} must end in .beton, or be a new folder for shards; "
            f"name a file such as {folder / 'dataset.beton'}."
        )
    if is_beton and target.is_dir():
        raise DataError(f"The target {target} is a folder; choose another name.")
    if not is_beton and target.exists():
        check_replaceable(target)
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise DataError(f"The target {target} lies inside the source {source}; choose one outside of it.")
    if is_beton and shards is not None:
        raise DataError(f"The target {target} is one file; name a folder to get shards.")
    if not is_beton and settings.storage != "jpg":
        raise DataError(
            f"Shards hold JPEG files, not {settings.storage} storage; name a target that ends in .beton."
        )
    for name, value, low, high in (("shards", shards, 1, 1_000_000), ("workers", workers, 1, 1024)):
        if value is not None and not low <= value <= high:
            raise DataError(f"{name} must be between {low} and {high}, not {value}; change it.")
