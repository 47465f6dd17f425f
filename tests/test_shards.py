"""Promises of `tools.convert.shards`: plain tar files that tarfile, tar and DALI read alike."""

import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tools.convert.shards import ShardTarget
from tools.convert.target import SAMPLE


def make_block(rng: np.random.Generator, count: int, label: int) -> tuple[np.ndarray, list[bytes]]:
    """Samples whose images are random bytes, of lengths around a tar block's."""
    encoded = [rng.bytes(int(rng.integers(1, 1600))) for _ in range(count)]
    encoded[0] = rng.bytes(1024)
    return np.array([(0, 1, 5, 7, label, len(data)) for data in encoded], SAMPLE), encoded


def write(folder: Path, *, label: int = 3) -> list[bytes]:
    """Three shards of 40 source entries, with 5, 0 and 13 samples in blocks of 2, 3, 6 and 7."""
    rng = np.random.default_rng(5)
    target = ShardTarget(folder, 40, 3)
    assert target.bounds == (13, 26, 40)
    images = []
    for count, ends in [(2, False), (3, True), (0, True), (6, False), (7, True)]:
        samples_N, encoded = make_block(rng, count, label) if count else (np.zeros(0, SAMPLE), [])
        target.append(samples_N, encoded, ends)
        images += encoded
    list(target.finish())
    target.close()
    return images


def test_tarfile_reads_the_samples_in_order(tmp_path: Path) -> None:
    images = write(tmp_path / "x", label=12345)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "shard-000000.idx",
        "shard-000000.tar",
        "shard-000001.idx",
        "shard-000001.tar",
    ]
    found = []
    for number in range(2):
        with tarfile.open(tmp_path / "x" / f"shard-{number:06}.tar") as tar:
            members = tar.getmembers()
            assert all(m.isreg() and (m.mtime, m.uid, m.gid, m.mode) == (0, 0, 0, 0o644) for m in members)
            found += [(m.name, tar.extractfile(m).read()) for m in members]
    expected = []
    for number, image in enumerate(images):
        expected += [(f"{number:09}.jpg", image), (f"{number:09}.cls", b"12345")]
    assert found == expected


def test_tar_program_takes_them(tmp_path: Path) -> None:
    write(tmp_path / "x")
    done = subprocess.run(
        ["tar", "--list", "--file", tmp_path / "x" / "shard-000001.tar"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 26


@pytest.mark.parametrize("label", [-1, 0, 999])
def test_index_is_that_of_dali(label: int, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    write(tmp_path / "x", label=label)
    for shard in sorted((tmp_path / "x").glob("*.tar")):
        with wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert shard.with_suffix(".idx").read_text() == (tmp_path / "theirs.idx").read_text()


def test_dali_reads_images_and_labels(tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    images = write(tmp_path / "x", label=42)
    shards = sorted(map(str, (tmp_path / "x").glob("*.tar")))
    pipeline = dali.Pipeline(batch_size=len(images), num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(
            *dali.fn.readers.webdataset(
                paths=shards,
                index_paths=[shard.replace(".tar", ".idx") for shard in shards],
                ext=["jpg", "cls"],
                missing_component_behavior="error",
            )
        )
    jpg, cls = pipeline.run()
    assert [np.asarray(jpg[i]).tobytes() for i in range(len(images))] == images
    assert {np.asarray(cls[i]).tobytes() for i in range(len(images))} == {b"42"}


def test_samples_without_labels_have_no_label_file(tmp_path: Path) -> None:
    write(tmp_path / "x", label=-1)
    with tarfile.open(tmp_path / "x" / "shard-000000.tar") as tar:
        assert [Path(name).suffix for name in tar.getnames()] == [".jpg"] * 5


def test_restored_target_goes_on_where_the_other_stopped(tmp_path: Path) -> None:
    """In the middle of the last shard; what was written after that, and the other's index, is made anew."""
    rng = np.random.default_rng(6)
    blocks = [
        (*make_block(rng, count, 1), ends) for count, ends in [(4, True), (3, True), (2, False), (5, True)]
    ]

    def finish(target: ShardTarget, rest: list) -> dict[str, bytes]:
        for block in rest:
            target.append(*block)
        list(target.finish())
        target.close()
        return {path.name: path.read_bytes() for path in sorted(target.part.iterdir())}

    whole = finish(ShardTarget(tmp_path / "whole", 30, 3), blocks)
    assert len(whole) == 6
    for done in range(5):
        stopped = ShardTarget(tmp_path / "x", 30, 3)
        finish(stopped, [*blocks[:done], *((*block[:2], False) for block in blocks[done:][::-1])])
        target = ShardTarget(tmp_path / "x", 30, 3)
        for samples_N, _, ends in blocks[:done]:
            target.restore(samples_N, ends)
        target.truncate()
        assert finish(target, blocks[done:]) == whole
