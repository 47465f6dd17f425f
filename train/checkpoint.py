"""Checkpoints: written so that a crash at any moment leaves a whole one, and read with clear errors.

The last checkpoint and the one before it are kept. Every tensor in them has a checksum (the CRC-32 of the zip
archive that `torch.save` writes), which is compared when they are read.

A checkpoint is a dict: `format` (1), `config` (`RunConfig` as plain data), `model` (state dict of `Twin`),
`optimizer`, `scaler` (empty without fp16), `step` (global steps done), `num_samples` (of the dataset) and,
where there is one, `probe` (of the online evaluation).
`torch.load(path, weights_only=True)` reads it.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch

from model.tensor_files import UnsafeFileError, is_plain, load_intact
from model.twin import Twin
from model.weights import differences
from train.config import RunConfig
from train.errors import TrainingError
from train.files import root_cause, write_atomically
from train.optim import Lars

FORMAT = 1
CHECKPOINT_NAME = "checkpoint.pt"
PREVIOUS, DAMAGED = "previous", "damaged"  # checkpoint.previous.pt and checkpoint.damaged.pt lie beside it

RETRY_SECONDS = 30  # after a checkpoint that could not be written
FINAL_SECONDS = 300  # of trying where the process is about to end; the other ranks wait for twice as long

_log = logging.getLogger(__name__)

KINDS = {  # what every checkpoint has; of the rest, see `check_fits`
    "format": int,
    "config": dict,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "step": int,
    "num_samples": int,
}

# A run may go on only with the settings that fix which samples and crops each step takes and what it learns
# from them. These may differ; of them, precision, compile and loader change the rounding and pixels a bit.
FREE_KEYS = (
    "run_dir",
    "data.path",  # `num_samples` is compared instead
    "data.loader",
    "data.workers",
    "data.prefetch",
    "data.on_bad_sample",
    "data.dali",
    "model.norm",
    "model.loss.algorithm",
    "train.max_steps",
    "train.precision",
    "train.device",
    "train.log_every",
    "train.max_skipped_steps",
    "train.compile",
    "train.cuda_graph",
    "train.wandb",
    "train.checkpoint",
    "eval",
)


class DamagedCheckpointError(TrainingError):
    """A checkpoint that is cut short, altered, or none at all."""


class CheckpointWriter:
    """Writes a run's checkpoints; where that fails, training goes on, and it is tried again.

    `every_minutes` after the last one, or `RETRY_SECONDS` after a failure, `is_due` says that the next one is
    wanted.
    """

    def __init__(self, path: Path, every_minutes: float | None) -> None:
        self.path = path
        self._seconds = float("inf") if every_minutes is None else 60 * every_minutes
        self._due = time.monotonic() + self._seconds

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def write(self, state: dict[str, Any], *, is_last: bool) -> bool:
        """Write `state`, or warn that it cannot be done; returns whether it is written.

        The last one of a process is tried for `FINAL_SECONDS`; then `TrainingError` is raised.
        """
        end = time.monotonic() + FINAL_SECONDS
        while True:
            try:
                save_checkpoint(state, self.path)
            except TrainingError as error:
                if is_last and time.monotonic() >= end:
                    raise
                self._due = time.monotonic() + RETRY_SECONDS
                goes_on = "This is" if is_last else "Training goes on, and this is"
                _log.warning("%s %s tried again in %g s.", error, goes_on, RETRY_SECONDS)
                if not is_last:
                    return False
                time.sleep(RETRY_SECONDS)
            else:
                self._due = time.monotonic() + self._seconds
                return True


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Replace `path` by `state` in one atomic step that survives a power cut; what it held before is kept.

    Raises `TrainingError` where that fails; `path`, or the checkpoint before it, then still is a whole one.
    """
    try:
        write_atomically(
            path, lambda file: torch.save({"format": FORMAT, **state}, file), keep=_beside(path, PREVIOUS)
        )
    except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into a RuntimeError
        raise TrainingError(
            f"Cannot write the checkpoint {path}: {root_cause(error)}; make room, and if the run has ended, "
            f"start it again: it goes on from the last checkpoint, if there is one."
        ) from error


def load_last_good(path: Path) -> tuple[dict[str, Any] | None, bool]:
    """The checkpoint at `path`, and whether it is sound; where it is not, with a warning the one before it.

    (None, True) where there is neither. Raises `TrainingError` where none of those that exist can be taken.
    """
    previous = _beside(path, PREVIOUS)
    if not _exists(path) and not _exists(previous):
        return None, True
    try:
        return load_checkpoint(path), True
    except TrainingError as error:
        is_damaged = isinstance(error, DamagedCheckpointError)
        if not _exists(previous) or (_exists(path) and not is_damaged):
            raise
        try:
            state = load_checkpoint(previous)
        except DamagedCheckpointError:
            if is_damaged:
                raise error from None
            raise
        reason = str(error).partition(";")[0].removesuffix(".")
        _log.warning("%s; the run goes on from the one before it, %s.", reason, previous)
        return state, not is_damaged


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, lest the next one put it in the place of the good one before.

    Raises `TrainingError` where that fails.
    """
    try:
        path.replace(_beside(path, DAMAGED))
    except OSError as error:
        raise TrainingError(
            f"Cannot rename the damaged checkpoint {path}: {error.strerror}; make its folder writable."
        ) from error


def load_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """The checkpoint at `path`. Raises `TrainingError` where the file is unreadable or foreign.

    `DamagedCheckpointError` where it is cut short or altered.
    """
    try:
        state = load_intact(path, map_location)
    except OSError as error:
        raise TrainingError(f"Cannot read the checkpoint {path}: {error.strerror or error}.") from None
    except UnsafeFileError:
        raise TrainingError(
            f"The checkpoint {path} names more than tensors and plain data, which could run code, and is not "
            f"read; move it away to start anew."
        ) from None
    except ValueError:
        raise DamagedCheckpointError(
            f"The checkpoint {path} is damaged, cut short or none at all; move it away to start anew."
        ) from None
    if not isinstance(state, dict) or any(not isinstance(state.get(key), k) for key, k in KINDS.items()):
        raise TrainingError(f"{path} is not a checkpoint of fastbarlow; move it away to start anew.")
    if state["format"] != FORMAT:
        raise TrainingError(
            f"The checkpoint {path} has format {state['format']}, but this version reads format {FORMAT}."
        )
    return state


def check_resumable(state: dict[str, Any], config: RunConfig, num_samples: int, path: Path) -> None:
    """Raise `TrainingError` unless going on from `state` under `config` is the same run."""
    then, now = (_flatten(c) for c in (state["config"], config.model_dump(mode="json")))
    for key in sorted(then.keys() | now.keys(), key=lambda key: (not key.startswith("model."), key)):
        is_free = any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
        if not is_free and then.get(key) != now.get(key):
            raise TrainingError(
                f"The checkpoint {path} was trained with {key}={then.get(key)}, but this config asks for "
                f"{now.get(key)}; set it back, or choose another run_dir for another run."
            )
    if state["num_samples"] != num_samples:
        raise TrainingError(
            f"The checkpoint {path} was trained on {state['num_samples']} images, but data.path "
            f"{config.data.path} has {num_samples}; train on the same dataset, or choose another run_dir."
        )


def check_fits(state: dict[str, Any], twin: Twin, optimizer: Lars, path: Path) -> None:
    """Raise `TrainingError` unless `state` has the tensors of `twin` and `optimizer`, by name and shape.

    An intact checkpoint has them, where `check_resumable` has found nothing. Of the probe and the scaler,
    which may be unlike the run's, it must have what there is to load.
    """
    groups = optimizer.state_dict()["param_groups"]
    shapes_P = [p.shape for group in optimizer.param_groups for p in group["params"]]
    is_fit = all(map(is_plain, state["model"].values())) and not differences(
        state["model"], {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    )
    try:
        saved = state["optimizer"]["param_groups"]
        is_fit &= [group["params"] for group in saved] == [group["params"] for group in groups]
        is_fit &= all(then.keys() == now.keys() for then, now in zip(saved, groups, strict=True))
        for number, of_parameter in state["optimizer"]["state"].items():
            is_fit &= is_plain(of_parameter["mu"]) and of_parameter["mu"].shape == shapes_P[number]
        probe, scaler = state.get("probe", {}), state["scaler"]
        is_fit &= probe.keys() <= {"weight"} and all(map(is_plain, probe.values()))
        is_fit &= not scaler or scaler.keys() == torch.amp.GradScaler("cpu").state_dict().keys()
        is_fit &= all(isinstance(number, float | int) for number in scaler.values())
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        is_fit = False
    if not is_fit:
        raise TrainingError(
            f"The tensors in the checkpoint {path} are not those of the network that its own config names; "
            f"move it away to start anew."
        )


def _exists(path: Path) -> bool:
    """Raises `TrainingError` where that cannot be known: to start anew could cost a good checkpoint."""
    try:
        return path.exists()
    except OSError as error:
        raise TrainingError(f"Cannot read the checkpoint {path}: {error.strerror}.") from error


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.stem}.{kind}{path.suffix}")


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        key = f"{prefix}{name}"
        flat |= _flatten(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat
