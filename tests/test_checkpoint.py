"""A checkpoint is whole or absent, and an unfit one is refused in one sentence."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.checkpoint import (
    FINAL_SECONDS,
    RETRY_SECONDS,
    CheckpointWriter,
    check_resumable,
    load_checkpoint,
    load_last_good,
    save_checkpoint,
    set_aside,
)
from train.config import RunConfig
from train.errors import TrainingError

CONFIG = {"run_dir": "runs/x", "data": {"path": "images"}, "model": {"backbone": "resnet18"}}


def state(step: int, config: dict[str, Any] = CONFIG) -> dict[str, Any]:
    return {
        "config": RunConfig.model_validate(config).model_dump(mode="json"),
        "model": {"weight": torch.full((1000,), float(step))},
        "optimizer": {},
        "scaler": {},
        "step": step,
        "num_samples": 100,
    }


def refusal(path: Path) -> str:
    with pytest.raises(TrainingError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_saved_checkpoint_loads_equal(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(state(3), path)
    loaded = load_checkpoint(path)
    assert loaded["step"] == 3 and loaded["format"] == 1 and loaded["config"] == state(3)["config"]
    assert torch.equal(loaded["model"]["weight"], torch.full((1000,), 3.0))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_failure_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(state(1), path)

    def fail(*args: Any) -> None:
        if failing == "torch.save":
            args[1].write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(failing, fail)
        with pytest.raises(TrainingError, match="No space left on device"):
            save_checkpoint(state(2), path)
    assert load_checkpoint(path)["step"] == 1
    expected = {"checkpoint.pt"} | (
        {"checkpoint.previous.pt"} if failing == "pathlib.Path.replace" else set()
    )
    assert {p.name for p in tmp_path.iterdir()} == expected


def test_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="Not a directory"):
        save_checkpoint(state(1), tmp_path / "file" / "checkpoint.pt")


def test_failure_of_the_last_flush_leaves_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(state(1), path)
    fsync = os.fsync

    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail_for_folders)
        with pytest.raises(TrainingError, match="Input/output error"):
            save_checkpoint(state(2), path)
    assert load_checkpoint(path)["step"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint.previous.pt"}


def test_full_disk_is_told_in_the_systems_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    path = tmp_path / "checkpoint.pt"
    path.with_name("checkpoint.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="No space left on device"):
        save_checkpoint(state(1), path)
    assert not path.exists()


@pytest.mark.parametrize("has_links", [True, False])
def test_checkpoint_before_the_last_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """Also on file systems without hard links."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr("os.link", refuse)
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2, 3):
        save_checkpoint(state(step), path)
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(tmp_path / "checkpoint.previous.pt")["step"] == 2
    assert len(list(tmp_path.iterdir())) == 2
    state_read, is_sound = load_last_good(path)
    assert state_read["step"] == 3 and is_sound


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing"])
def test_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load_last_good(path) == (None, True)
    for step in (1, 2):
        save_checkpoint(state(step), path)
    content = bytearray(path.read_bytes())
    middle = content.index(torch.full((8,), 2.0).numpy().tobytes())
    content[middle] ^= 64
    path.unlink()  # or else the one before, another name of no file of its own, would not care
    if damage != "missing":
        path.write_bytes({"cut": content[:-700], "flipped": content, "empty": b""}[damage])
    state_read, is_sound = load_last_good(path)
    assert (state_read["step"], is_sound) == (1, damage == "missing")
    (warning,) = caplog.messages
    assert str(path) in warning and "goes on from the one before it" in warning and "\n" not in warning
    if not is_sound:
        set_aside(path)
        save_checkpoint(state(3), path)
        assert load_checkpoint(path)["step"] == 3
        assert load_checkpoint(tmp_path / "checkpoint.previous.pt")["step"] == 1
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"")
    path.write_bytes(b"")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt is damaged"):
        load_last_good(path)
    path.unlink()  # as that error advises
    with pytest.raises(TrainingError, match=r"checkpoint\.previous\.pt is damaged"):
        load_last_good(path)


def test_checkpoint_that_cannot_be_looked_for_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than taken for none, which would start the run anew."""
    with pytest.raises(TrainingError, match="name too long"):
        load_last_good(tmp_path / (300 * "x") / "checkpoint.pt")

    def fail(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(TrainingError, match=r"Cannot rename .*: Read-only file system"):
        set_aside(tmp_path / "checkpoint.pt")


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """Anywhere in the file: it is refused, or the bit was of no meaning and all values are the saved ones."""
    path = tmp_path / "checkpoint.pt"
    values = state(7)
    save_checkpoint(values, path)
    whole = path.read_bytes()
    random = np.random.default_rng()
    refused = 0
    for at in random.integers(0, len(whole), 200):
        content = bytearray(whole)
        content[at] ^= 1 << random.integers(8)
        path.write_bytes(content)
        try:
            loaded = load_checkpoint(path)
        except TrainingError:
            refused += 1
            continue
        assert torch.equal(loaded.pop("model")["weight"], values["model"]["weight"]), at
        assert loaded == {"format": 1, **{k: v for k, v in values.items() if k != "model"}}, at
    assert refused > 100


class FullDisk:
    """A disk that is full for the first `times` checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.times, self.tries, self.slept = times, 0, []
        self._save = save_checkpoint
        monkeypatch.setattr("train.checkpoint.save_checkpoint", self)
        monkeypatch.setattr("train.checkpoint.time.sleep", self.slept.append)
        monkeypatch.setattr("train.checkpoint.time.monotonic", lambda: 1000.0 + sum(self.slept))

    def __call__(self, state: dict[str, Any], path: Path) -> None:
        self.tries += 1
        if self.tries <= self.times:
            raise TrainingError("Cannot write the checkpoint: No space left on device.")
        self._save(state, path)


def test_checkpoint_that_cannot_be_written_is_due_again_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FullDisk(monkeypatch, 1)
    now = [1000.0]
    monkeypatch.setattr("train.checkpoint.time.monotonic", lambda: now[0])
    writer = CheckpointWriter(tmp_path / "checkpoint.pt", every_minutes=2)
    now[0] += 119
    assert not writer.is_due
    now[0] += 1
    assert writer.is_due
    assert not writer.write(state(1), is_last=False) and not writer.is_due
    assert "No space left on device. Training goes on, and this is tried again in 30 s." in caplog.text
    now[0] += RETRY_SECONDS
    assert writer.is_due
    assert writer.write(state(2), is_last=False) and not writer.is_due
    now[0] += 120
    assert writer.is_due
    assert not CheckpointWriter(tmp_path / "checkpoint.pt", every_minutes=None).is_due


def test_last_checkpoint_is_tried_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, 3)
    writer = CheckpointWriter(tmp_path / "checkpoint.pt", every_minutes=None)
    assert writer.write(state(5), is_last=True)
    assert disk.slept == [RETRY_SECONDS] * 3
    disk = FullDisk(monkeypatch, 100)
    with pytest.raises(TrainingError, match="No space left on device"):
        writer.write(state(6), is_last=True)
    assert sum(disk.slept) == FINAL_SECONDS and disk.tries == len(disk.slept) + 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_checkpoint_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(state(1), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged" in refusal(path)


def test_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(state(1), path)
    content = bytearray(path.read_bytes())
    at = content.index(torch.full((8,), 1.0).numpy().tobytes())  # among the weights
    content[at] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_text("not a checkpoint")
    assert "damaged" in refusal(path)
    torch.save({"state_dict": {}}, path)
    assert "not a checkpoint of fastbarlow" in refusal(path)
    torch.save({**state(1), "format": 9}, path)
    assert "format 9" in refusal(path)
    assert "No such file" in refusal(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"backbone": "resnet50"}}, "model.backbone=resnet18, but this config asks for resnet50"),
        ({"model": {"backbone": "resnet18", "projector": "8-8"}}, "model.projector="),
        ({"seed": 1}, "seed=0"),
        ({"train": {"batch_size": 64}}, "train.batch_size=2048"),
        ({"train": {"optim": {"lr_weights": 0.5}}}, "train.optim.lr_weights=0.2"),
        ({"data": {"path": "images", "image_size": 64}}, "data.image_size=224"),
    ],
)
def test_checkpoint_of_another_run_is_refused(change: dict[str, Any], words: str) -> None:
    config = RunConfig.model_validate({**CONFIG, **change})
    with pytest.raises(TrainingError) as caught:
        check_resumable(state(1), config, 100, Path("checkpoint.pt"))
    assert words in str(caught.value)


def test_what_does_not_change_the_run_may_differ() -> None:
    config = RunConfig.model_validate(
        {
            **CONFIG,
            "run_dir": "elsewhere",
            "data": {"path": "copy.beton", "loader": "dali", "workers": 2},
            "train": {"precision": "fp32", "log_every": 3, "max_steps": 9, "checkpoint": {"every_steps": 5}},
        }
    )
    check_resumable(state(1), config, 100, Path("checkpoint.pt"))
    with pytest.raises(TrainingError, match="trained on 100 images"):
        check_resumable(state(1), config, 99, Path("checkpoint.pt"))
