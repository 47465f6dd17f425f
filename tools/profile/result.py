"""A profile is plain data, as in `profile.json`: the names of its phases, reading and writing."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import TrainingError
from train.step import PHASES

DATA_WAIT, COPY, GRAPH, EXPOSED, IDLE = "data wait", "copy", "step", "exposed communication", "idle"
# In the order of a step. GRAPH stands for all phases of TrainStep where a step is one CUDA graph.
SPLIT = DATA_WAIT, COPY, GRAPH, *PHASES[:-1], EXPOSED, PHASES[-1], IDLE
JSON_NAME = "profile.json"


def shares(phases: Mapping[str, float]) -> dict[str, float]:
    """Each phase's part of the step's time; the parts add up to 1."""
    total = sum(phases.values())
    return {phase: seconds / total for phase, seconds in phases.items()}


def headline(profile: Mapping[str, Any]) -> str:
    run = profile["run"]
    return f"One step: {1000 * run['step_seconds']:.1f} ms, {run['pairs_per_second']:.1f} pairs/s"


def check_writable(out: Path) -> None:
    """Raise `TrainingError` where `out` is no folder or cannot be made one; makes nothing."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise TrainingError(
            f"Cannot write the profile to {out}: {nearest} is no folder that one can write to."
        )


def make_folder(out: Path) -> None:
    """Raises `TrainingError` where that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error


def write_profile(profile: Mapping[str, Any], out: Path) -> None:
    """Write `profile.json` into `out`. Raises `TrainingError` where that fails."""
    try:
        (out / JSON_NAME).write_text(json.dumps(profile, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable(out, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises `TrainingError` where it cannot be read or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"Cannot read the profile {path}: {error.strerror}.") from error
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise TrainingError(f"{path} is not a profile; give a profile.json that fastbarlow profile wrote.")
    return content


def unwritable(out: Path, error: OSError) -> TrainingError:
    """What to raise where a file of the profile cannot be written."""
    return TrainingError(f"Cannot write the profile to {out}: {error.strerror}.")
