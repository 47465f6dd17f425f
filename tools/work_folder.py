"""What an evaluation has finished, in files, so that the same command goes on from there."""

import contextlib
import logging
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch

from model.tensor_files import load_intact
from train.errors import TrainingError
from train.files import root_cause, write_atomically
from train.preemption import StopRequest

SAVE_SECONDS = 120

_log = logging.getLogger(__name__)


class StoppedError(TrainingError):
    """A signal has ended the evaluation; what it had finished is kept."""


class WorkFolder:
    """An `eval.keeper.Keeper`, in a folder of this very evaluation; the folder appears when it is needed.

    Where it cannot be written to, the work goes on, and a warning says that a stop would cost it. Saving is
    due every `SAVE_SECONDS`, and where a stop is requested.
    """

    def __init__(self, folder: Path, stop: StopRequest) -> None:
        self.folder, self._stop = folder, stop
        self._due = time.monotonic() + SAVE_SECONDS
        self._has_warned = False

    @property
    def is_due(self) -> bool:
        return bool(self._stop.signal) or time.monotonic() >= self._due

    def load(self, name: str) -> Any | None:
        path = self._path(name)
        try:
            return load_intact(path, "cpu")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read (%s) and is computed again.", path, root_cause(error))
            return None

    def save(self, name: str, value: Any) -> None:
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: torch.save(value, file))
        except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into a RuntimeError
            if not self._has_warned:
                _log.warning(
                    "Cannot keep unfinished work in %s (%s); it goes on, but would start anew after a stop.",
                    self.folder,
                    root_cause(error),
                )
            self._has_warned = True
        self._due = time.monotonic() + SAVE_SECONDS
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        if self._stop.signal:
            name = signal.Signals(self._stop.signal).name
            raise StoppedError(f"Stopped by {name}; the same command goes on from {self.folder}.")

    def remove(self) -> None:
        """The folder, and the one around it where nothing else is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"
