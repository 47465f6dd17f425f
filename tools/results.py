"""Results of evaluations as files: one JSON object each, beside the checkpoint that was evaluated.

{"checkpoint": path, "checkpoint_sha256": hex, "architecture": "resnet50", "date": "2026-11-27",
 "environment": {...}, "protocol": ..., "settings": {...}, "data": {role: {path, images, classes}},
 "figures": {name: share}}
"""

import hashlib
import json
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from eval.result import EvalResult
from tools.environment import describe_environment
from train.errors import TrainingError
from train.files import write_text_atomically

FOLDER = "eval"


def result_record(
    result: EvalResult, checkpoint: Path, architecture: str, device: torch.device
) -> dict[str, Any]:
    """Plain data: the result, and what it takes to trust it; see `BackboneWeights` for `architecture`."""
    return {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": file_hash(checkpoint),
        "architecture": architecture,
        "date": date.today().isoformat(),
        "environment": describe_environment(device),
        **asdict(result),
    }


def default_place(checkpoint: Path, protocol: str, data: Path) -> Path:
    """Where the result of a protocol on the dataset `data` goes if nobody says otherwise."""
    return Path(checkpoint).parent / FOLDER / f"{Path(checkpoint).stem}-{protocol}-{Path(data).stem}.json"


def check_place(out: Path) -> None:
    """Raise `TrainingError` unless a result can be written to `out`; makes its folder."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
        reason = "it is a folder" if out.is_dir() else None
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise TrainingError(f"Cannot write the result to {out}: {reason}; choose another place with --out.")


def write_record(record: dict[str, Any], out: Path) -> None:
    """Write it to `out`, whole or not at all. Raises `TrainingError` where that fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(
            f"Cannot write the result to {out}: {error.strerror}; choose another place with --out."
        ) from error


def records_of(checkpoint: Path) -> list[dict[str, Any]]:
    """All results beside `checkpoint` that were measured with this very file, in order of their names."""
    digest, found = file_hash(checkpoint), []
    for path in sorted((Path(checkpoint).parent / FOLDER).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("checkpoint_sha256") == digest:
            found.append(record)
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of the file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
