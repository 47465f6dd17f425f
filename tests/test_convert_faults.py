"""Conversions that are interrupted, killed or out of disk lose nothing and end with the same bytes."""

import ctypes
import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pipelines.errors import DataError
from tools.cli import app
from tools.convert import convert
from tools.convert.images import prepare
from tools.convert.journal import open_journal
from tools.convert.manifest import ConvertSettings, load_manifest, manifest_path
from tools.convert.pool import prepare_entries
from tools.convert.publish import _exchange, part_path
from tools.convert.verify import verify

TARGETS = ["x.beton", "x"]
NUM_IMAGES = 101
BLOCK = 8
SETTINGS = ConvertSettings(max_side=48)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 images of noise in two classes; three files are no images, one of them the first of all."""
    root, rng = tmp_path_factory.mktemp("source") / "images", np.random.default_rng(8)
    for i in range(NUM_IMAGES):
        path = root / "ab"[i // 60] / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(30, 60, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        if i in (0, 40, 41):
            path.write_bytes(b"no image")
    return root


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.convert.blocks.ENTRIES", BLOCK)
    monkeypatch.setattr("tools.convert.pool.CHUNK", 4)


def run(images: Path, target: Path, **options: object) -> object:
    shards = None if target.suffix else 3
    return convert(images, target, **{"settings": SETTINGS, "shards": shards, "workers": 2} | options)


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of each dataset when nothing interrupts its conversion."""
    out = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.convert.blocks.ENTRIES", BLOCK)
        patch.setattr("tools.convert.pool.CHUNK", 5)  # of no account
        for name in TARGETS:
            run(images, out / name)
    return {name: contents(out / name) for name in TARGETS}


def contents(target: Path) -> dict[str, bytes]:
    """The files of a dataset but for the manifest."""
    files = [target] if target.is_file() else target.iterdir()
    return {file.name: file.read_bytes() for file in files if file.suffix != ".json"}


def check_complete(target: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """The dataset is what it would have been without interruption, and so says its manifest."""
    assert contents(target) == expected[target.name]
    verify(target)
    assert hidden(target) == []


def hidden(target: Path) -> list[str]:
    """What is beside the dataset and no part of it."""
    journal, old = (target.with_name(f".{target.name}.{ending}") for ending in ("journal", "old"))
    paths = (journal, old, part_path(target), part_path(manifest_path(target)))
    return [path.name for path in paths if path.exists()]


def interrupt_at(entries: int) -> Callable[[int, int], None]:
    """A progress function that does what Ctrl-C does."""

    def progress(done: int, total: int) -> None:
        if done >= entries:
            raise KeyboardInterrupt

    return progress


def interrupted(images: Path, target: Path, entries: int) -> int:
    """Begin a conversion and stop it there; returns how many entries it has journaled."""
    with pytest.raises(KeyboardInterrupt):
        run(images, target, progress=interrupt_at(entries))
    return journaled(target)


def journaled(target: Path) -> int:
    with open_journal(target) as journal:
        return journal.records[-1].entries if journal.records else 0


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("entries", [9, 34, 68, NUM_IMAGES])
def test_interrupted_conversion_goes_on(
    name: str, entries: int, images: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / name
    done = interrupted(images, target, entries)
    assert entries - BLOCK <= done <= entries
    assert hidden(target) == [f".{name}.journal", f".{name}.part"]
    assert not target.exists() and not manifest_path(target).exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("prepare", "recorder"))]

    prepared = []
    monkeypatch.setattr("tools.convert.pool.prepare", lambda *args: prepared.append(args) or prepare(*args))
    calls: list[int] = []
    manifest = run(images, target, progress=lambda now, total: calls.append(now))
    assert (calls[0], calls[-1]) == (done, NUM_IMAGES)
    assert len(prepared) <= NUM_IMAGES - done + 6  # the last few are the trial for the estimate
    check_complete(target, expected)
    assert [entry.file for entry in manifest.left_out] == ["a/000.jpg", "a/040.jpg", "a/041.jpg"]
    assert manifest.images == NUM_IMAGES - 3


@pytest.mark.parametrize("name", TARGETS)
def test_many_interruptions_and_torn_tails(name: str, images: Path, expected: dict, tmp_path: Path) -> None:
    """A kill leaves images after the last journaled block, and half a line in the journal."""
    target, rng = tmp_path / name, random.Random(3)
    for entries in (20, 37, 38, 70, 95):
        interrupted(images, target, entries)
        part = part_path(target)
        data = part if part.is_file() else sorted(part.glob("*.tar"))[-1]
        with data.open("ab") as file:
            file.write(rng.randbytes(rng.randint(1, 5000)))
        with (tmp_path / f".{name}.journal").open("r+b") as journal:
            journal.truncate(journal.seek(0, os.SEEK_END) - rng.randint(1, 40))
    run(images, target)
    check_complete(target, expected)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("flush_bytes", [1, 1 << 60])
def test_power_cut_costs_what_was_not_flushed(
    name: str, flush_bytes: int, images: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal then speaks of blocks whose bytes never reached the disk."""
    monkeypatch.setattr("tools.convert.recorder.FLUSH_BYTES", flush_bytes)
    target = tmp_path / name
    done = interrupted(images, target, 60)
    part = part_path(target)
    data = part if part.is_file() else sorted(part.glob("*.tar"))[-1]
    size = data.stat().st_size
    os.truncate(data, size - 9000)
    os.truncate(data, size)  # zeros
    calls: list[int] = []
    run(images, target, progress=lambda now, total: calls.append(now))
    assert calls[0] < done
    assert calls[0] == 0 or flush_bytes > 1
    check_complete(target, expected)


def test_sigkill_in_the_middle(images: Path, expected: dict, tmp_path: Path) -> None:
    """Of both kinds of dataset at a time, in another process."""
    script = f"""
import sys, threading, time
from pathlib import Path
import tools.convert.blocks, tools.convert.pool
from tools.convert import convert
from tools.convert.manifest import ConvertSettings
from tools.convert.pool import prepare_entries

def stop_in_the_middle(*args):
    if args[-1].start >= 70:
        time.sleep(1000)
    return prepare_entries(*args)

tools.convert.blocks.ENTRIES = {BLOCK}
tools.convert.pool.CHUNK = 4
sys.modules["tools.convert.convert"].prepare_entries = stop_in_the_middle
for name, shards in (("x.beton", None), ("x", 3)):
    options = dict(settings=ConvertSettings(max_side=48), shards=shards, workers=1)
    arguments = Path({str(images)!r}), Path({str(tmp_path)!r}) / name
    threading.Thread(target=convert, args=arguments, kwargs=options).start()
time.sleep(1000)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment)
    journals = [tmp_path / f".{name}.journal" for name in TARGETS]
    while not all(path.exists() and path.read_bytes().count(b"\n") > 4 for path in journals):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    for name in TARGETS:
        assert not (tmp_path / name).exists()
        assert 4 * BLOCK <= journaled(tmp_path / name) < NUM_IMAGES
        calls: list[int] = []
        run(images, tmp_path / name, progress=lambda now, total, calls=calls: calls.append(now))
        assert calls[0] >= 4 * BLOCK
        check_complete(tmp_path / name, expected)


@contextmanager
def small_disk(num_bytes: int):
    """No file of this process can grow beyond that: the kernel refuses it as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("share", [0.02, 0.6, 0.999])
def test_full_disk_leaves_the_old_dataset_and_what_is_done(
    name: str, share: float, images: Path, expected: dict, tmp_path: Path
) -> None:
    target = tmp_path / name
    old = run(images, target, settings=ConvertSettings(max_side=16))
    before = contents(target)
    largest = max(map(len, expected[name].values()))
    with (
        small_disk(int(largest * share)),
        pytest.raises(
            DataError, match=r"written to .* \(File too large\); free some space, .* goes on where"
        ),
    ):
        run(images, target)
    assert contents(target) == before
    assert load_manifest(target) == old
    assert (hidden(target) == []) == (share == 0.02)  # not one block was done
    run(images, target)
    check_complete(target, expected)


def test_journal_without_room_ends_the_conversion(
    images: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While there is room for images: no later block may follow the one that is missing in the journal."""
    from tools.convert.journal import Journal

    append, count = Journal.append, []

    def append_but_one(journal: Journal, record: object) -> None:
        count.append(record)
        if len(count) == 5:
            raise OSError(28, os.strerror(28))
        append(journal, record)

    monkeypatch.setattr(Journal, "append", append_but_one)
    with pytest.raises(DataError, match=r"\(No space left on device\); free some space"):
        run(images, tmp_path / "x.beton")
    assert journaled(tmp_path / "x.beton") == 4 * BLOCK
    run(images, tmp_path / "x.beton")
    check_complete(tmp_path / "x.beton", expected)


@pytest.mark.parametrize("name", TARGETS)
def test_two_conversions_do_not_share_a_target(
    name: str, images: Path, expected: dict, tmp_path: Path
) -> None:
    errors = []

    def convert_again(done: int, total: int) -> None:
        if not errors:
            with pytest.raises(DataError, match=r"Another conversion to .*/x\S* is running") as caught:
                run(images, tmp_path / name)
            errors.append(caught.value)

    run(images, tmp_path / name, progress=convert_again)
    assert len(errors) == 1
    check_complete(tmp_path / name, expected)


def test_lock_is_that_of_the_present_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that opens the journal just before another one removes it must open it again."""
    target, flock = tmp_path / "x.beton", fcntl.flock

    def remove_then_lock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".x.beton.journal").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    with open_journal(target), pytest.raises(DataError, match="is running"), open_journal(target):
        pass


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda root: (root / "a" / "100.jpg").write_bytes(b"more"), {}, "its source;"),
        (lambda root: (root / "b" / "070.jpg").write_bytes(b"shorter"), {}, "its source;"),
        (lambda root: (root / "b").rename(root / "c"), {}, "its source;"),
        (lambda root: None, {"settings": ConvertSettings(max_side=49)}, "its settings;"),
    ],
)
def test_other_source_or_settings_do_not_go_on(
    change: Callable, options: dict, words: str, images: Path, tmp_path: Path
) -> None:
    target, root = tmp_path / "x.beton", tmp_path / "images"
    for path in sorted(images.glob("*/*")):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    done = interrupted(root, target, 50)
    change(root)
    pattern = f"unfinished conversion to .* differs .* {words} convert as before .* --no-resume"
    with pytest.raises(DataError, match=pattern):
        run(root, target, **options)
    assert journaled(target) == done
    run(root, target, resume=False, **options)
    run(root, tmp_path / "fresh.beton", **options)
    assert target.read_bytes() == (tmp_path / "fresh.beton").read_bytes()
    assert hidden(target) == []


@pytest.mark.parametrize("name", TARGETS)
def test_remains_without_a_journal_are_overwritten(
    name: str, images: Path, expected: dict, tmp_path: Path
) -> None:
    target = tmp_path / name
    remains = part_path(target) if target.suffix else part_path(target) / "shard-000007.tar"
    remains.parent.mkdir(exist_ok=True)
    remains.write_bytes(b"remains" * 10**6)
    (tmp_path / f".{name}.journal").write_bytes(b"00000000 {}\nmore remains")
    (tmp_path / ".x.manifest.json.part").write_bytes(b"remains")
    run(images, target)
    check_complete(target, expected)


@pytest.mark.parametrize("name", TARGETS)
def test_removed_part_begins_anew(name: str, images: Path, expected: dict, tmp_path: Path) -> None:
    target = tmp_path / name
    interrupted(images, target, 60)
    part_path(target).rename(tmp_path / "gone")
    run(images, target)
    check_complete(target, expected)


def test_image_that_vanishes_is_left_out(images: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    for path in sorted(images.glob("b/*")):
        (root / "a" / path.name).write_bytes(path.read_bytes())
    gone = root / "a" / "077.jpg"
    manifest = run(root, tmp_path / "x.beton", on_estimate=lambda known: gone.unlink())
    assert [(entry.file, entry.reason) for entry in manifest.left_out] == [
        ("a/077.jpg", "cannot be read: No such file or directory")
    ]
    assert manifest.images == 40


def test_source_that_vanishes_ends_the_conversion(images: Path, expected: dict, tmp_path: Path) -> None:
    """A network drive may come back: nothing of it is left out."""
    link, calls = tmp_path / "images", []
    link.symlink_to(images)

    def unmount(done: int, total: int) -> None:
        calls.append(done)
        if done >= 40 and link.is_symlink():
            link.unlink()

    with pytest.raises(DataError, match=r"images can no longer be read .*; bring it back, .* goes on"):
        run(link, tmp_path / "x.beton", progress=unmount)
    assert not (tmp_path / "x.beton").exists()
    link.symlink_to(images)
    run(link, tmp_path / "x.beton", progress=lambda done, total: calls.append(done))
    assert calls.count(0) == 1
    check_complete(tmp_path / "x.beton", expected)


@contextmanager
def killed_before(monkeypatch: pytest.MonkeyPatch, method: str, target: Path) -> Iterator[None]:
    """The block ends where `Path`'s `method` is about to give something the name `target`."""
    move = getattr(Path, method)

    def killed(path: Path, to: Path) -> Path:
        if to == target:
            raise KeyboardInterrupt
        return move(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, method, killed)
        yield


def test_kill_between_the_names_of_shards_is_repaired(
    images: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder has gone aside, the new one has not got its name yet."""
    monkeypatch.setattr("tools.convert.publish._exchange", lambda first, second: False)
    target = tmp_path / "x"
    run(images, target, settings=ConvertSettings(max_side=16))
    with killed_before(monkeypatch, "rename", target):
        run(images, target)
    assert not target.exists()
    calls = []
    run(images, target, progress=lambda done, total: calls.append(done))
    assert calls[0] == NUM_IMAGES
    check_complete(target, expected)


def test_shards_are_replaced_in_one_step(
    images: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment is there no dataset; a kill right after that step leaves the new one."""
    target = tmp_path / "x"
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    if not _exchange(tmp_path / "1", tmp_path / "2"):
        pytest.skip("the system here cannot exchange names")
    old = run(images, target, settings=ConvertSettings(max_side=16))
    with killed_before(monkeypatch, "rename", tmp_path / ".x.old"):
        run(images, target)
    assert contents(target) == expected["x"]
    assert load_manifest(part_path(target)) == old
    seen, rename = [], Path.rename

    def watched(path: Path, to: Path) -> Path:
        seen.append(load_manifest(target).settings.max_side)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", watched)
    run(images, target)
    assert seen == [SETTINGS.max_side]
    check_complete(target, expected)


def test_older_shards_are_not_taken_for_the_new_ones(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill they are where the new ones were made, and their last shard is the same."""
    monkeypatch.setattr("tools.convert.recorder.FLUSH_BYTES", 1)
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    if not _exchange(tmp_path / "1", tmp_path / "2"):
        pytest.skip("the system here cannot exchange names")
    root, target = tmp_path / "images", tmp_path / "x"
    shutil.copytree(images, root)
    run(root, target)
    shutil.copyfile(root / "b" / "070.jpg", root / "a" / "003.jpg")
    with killed_before(monkeypatch, "rename", tmp_path / ".x.old"):
        run(root, target)
    new = contents(target)
    run(root, target)
    assert contents(target) == new
    verify(target)
    assert hidden(target) == []


@pytest.mark.parametrize(("number", "words"), [(errno.EINVAL, None), (errno.EACCES, "Permission denied")])
def test_only_a_system_that_cannot_exchange_names_goes_without(
    number: int,
    words: str | None,
    images: Path,
    expected: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "x"
    run(images, target, settings=ConvertSettings(max_side=16))
    before = contents(target)

    class Library:
        def renameat2(self, *_: object) -> int:
            ctypes.set_errno(number)
            return -1

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **__: Library())
        if words is None:
            run(images, target)
        else:
            with pytest.raises(DataError, match=words):
                run(images, target)
            assert contents(target) == before
    run(images, target)
    check_complete(target, expected)


@pytest.mark.parametrize("moment", ["data", "manifest"])
def test_kill_while_a_file_gets_its_name_leaves_no_wrong_manifest(
    moment: str, images: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class names of one dataset beside the labels of another would go unnoticed."""
    target = tmp_path / "x.beton"
    run(images, target, settings=ConvertSettings(max_side=16))
    last = {"data": target, "manifest": manifest_path(target)}[moment]
    with killed_before(monkeypatch, "replace", last):
        run(images, target)
    assert not manifest_path(target).exists()
    assert (target.read_bytes() == expected["x.beton"]["x.beton"]) == (moment == "manifest")
    run(images, target)
    check_complete(target, expected)


@pytest.mark.parametrize("name", TARGETS)
def test_kill_after_the_last_step_leaves_nothing_unfinished(
    name: str, images: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataset is complete, only its journal is still there: other settings are welcome."""
    from tools.convert.journal import Journal

    def killed(journal: Journal) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / name, settings=ConvertSettings(max_side=16))
    assert journaled(tmp_path / name) == NUM_IMAGES
    run(images, tmp_path / name)
    check_complete(tmp_path / name, expected)


@pytest.mark.parametrize("is_archive", [False, True])
def test_other_source_of_the_same_names_and_sizes_does_not_go_on(
    is_archive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pixels are others: neither a copy elsewhere nor files written anew are gone on with."""
    rng, target = np.random.default_rng(5), tmp_path / "x.beton"

    def write(name: str) -> Path:
        root = tmp_path / name
        for i in range(40):
            path = root / "a" / f"{i:03}.bmp"  # every one has as many bytes
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (31, 17, 3), dtype=np.uint8)).save(path)
        if not is_archive:
            return root
        archive = root.with_suffix(".tar")
        with tarfile.open(archive, "w") as file:
            file.add(root, arcname="images")
        return archive

    first, second = write("first"), write("second")
    done = interrupted(first, target, 20)
    refused = pytest.raises(DataError, match=r"unfinished conversion to .* its source; convert as")
    with refused:
        run(second, target)
    status = first.stat() if is_archive else (first / "a" / "003.bmp").stat()
    write("first")
    changed = first if is_archive else first / "a" / "003.bmp"
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with refused:
        run(first, target)
    assert journaled(target) == done
    manifest = run(second, target, resume=False)
    run(second, tmp_path / "fresh.beton")
    assert target.read_bytes() == (tmp_path / "fresh.beton").read_bytes()
    (tmp_path / "moved").mkdir()
    moved = second.rename(tmp_path / "moved" / second.name)
    assert run(moved, tmp_path / "moved.beton").source_fingerprint == manifest.source_fingerprint


@pytest.mark.parametrize("line", [0, 1, 3])
@pytest.mark.parametrize("content", [{"format": 1}, {"entries": 8, "samples_N": "AAA="}, [1], 7])
def test_journal_of_another_version_is_not_gone_on_with(
    line: int, content: object, images: Path, expected: dict, tmp_path: Path
) -> None:
    target, journal = tmp_path / "x.beton", tmp_path / ".x.beton.journal"
    interrupted(images, target, 60)
    lines = journal.read_bytes().splitlines(keepends=True)
    text = json.dumps(content).encode()
    lines[line] = b"%08x %s\n" % (zlib.crc32(text), text)
    journal.write_bytes(b"".join(lines))
    before = part_path(target).read_bytes(), journal.read_bytes()
    with pytest.raises(DataError, match=r"unfinished conversion to .* differs .*; convert as before"):
        run(images, target)
    assert (part_path(target).read_bytes(), journal.read_bytes()) == before
    run(images, target, resume=False)
    check_complete(target, expected)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_only_a_file_system_without_locks_goes_without(
    number: int, images: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        if number in (errno.ENOLCK, errno.EOPNOTSUPP):
            run(images, tmp_path / "x.beton")
        else:
            words = "cannot be written" if number == errno.EIO else "Another conversion to .* is running"
            with pytest.raises(DataError, match=words):
                run(images, tmp_path / "x.beton")
            assert not (tmp_path / "x.beton").exists()
    run(images, tmp_path / "x.beton")
    check_complete(tmp_path / "x.beton", expected)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_too_many_bad_images_fail_the_command_but_not_the_dataset(images: Path, tmp_path: Path) -> None:
    result = call("convert", images, tmp_path / "x.beton")
    assert result.exit_code == 1
    (sentence,) = result.stderr.splitlines()
    assert re.search(
        r"2\.97% of the images are bad, more than --max-bad 0\.001; see left_out in .*json", sentence
    )
    assert "Left out as unreadable: 3; see" in result.stdout
    assert len(load_manifest(tmp_path / "x.beton").left_out) == 3
    assert call("convert", images, tmp_path / "y.beton", "--max-bad", "0.03").exit_code == 0
    assert (tmp_path / "y.beton").read_bytes() == (tmp_path / "x.beton").read_bytes()


def test_ctrl_c_says_that_the_same_command_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> object:
        if arguments[-1].start >= 60:
            raise KeyboardInterrupt
        return prepare_entries(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tools.convert.convert"], "prepare_entries", interrupt)
        result = call("convert", images, tmp_path / "x.beton")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["Interrupted; the same command goes on where it stopped."]
    done = journaled(tmp_path / "x.beton")
    assert done >= 40
    again = call("convert", images, tmp_path / "x.beton", "--max-bad", 1)
    assert again.exit_code == 0
    assert f"Going on after {done} of {NUM_IMAGES} files" in again.stdout


@pytest.mark.parametrize("name", TARGETS)
def test_impatient_ctrl_c_is_as_good_as_one(name: str, images: Path, expected: dict, tmp_path: Path) -> None:
    """Pressed again and again while the blocks in work are recorded."""
    script = f"""
import signal, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
import tools.convert.blocks, tools.convert.pool
from tools.cli import app
from tools.convert.recorder import RunningChecksum

add, calls = RunningChecksum.add, []

def wait_after_two(*args):
    calls.append(args)
    if len(calls) == 3:
        Path({str(tmp_path / "waits")!r}).touch()
        while not Path({str(tmp_path / "go on")!r}).exists():
            time.sleep(0.01)
    return add(*args)

tools.convert.blocks.ENTRIES = {BLOCK}
tools.convert.pool.CHUNK = 4
RunningChecksum.add = wait_after_two
app({["convert", str(images), str(tmp_path / name), "--max-side", "48", "--workers", "2"]!r}
    + {["--shards", "3"] if name == "x" else []!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes)
    while not (tmp_path / "waits").exists():
        assert child.poll() is None
        time.sleep(0.01)
    for _ in range(10):
        child.send_signal(signal.SIGINT)
        time.sleep(0.02)
    (tmp_path / "go on").touch()
    _, errors = child.communicate()
    assert child.returncode == 130
    assert errors.splitlines() == ["Interrupted; the same command goes on where it stopped."]
    done = journaled(tmp_path / name)
    assert done >= 2 * BLOCK
    calls: list[int] = []
    run(images, tmp_path / name, progress=lambda now, total: calls.append(now))
    assert calls[0] == done
    check_complete(tmp_path / name, expected)


def test_only_the_usual_ctrl_c_is_changed_and_only_for_a_conversion(images: Path, tmp_path: Path) -> None:
    before, handlers = signal.getsignal(signal.SIGINT), []

    def note(*_: object) -> None:
        handlers.append(signal.getsignal(signal.SIGINT))

    try:
        for handler in (signal.default_int_handler, note):
            signal.signal(signal.SIGINT, handler)
            run(images, tmp_path / "x.beton", progress=note)
            assert signal.getsignal(signal.SIGINT) is handler
            assert (set(handlers) == {handler}) == (handler is note)
            handlers.clear()
    finally:
        signal.signal(signal.SIGINT, before)
