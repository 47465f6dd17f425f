"""An audit as plain data, and its files.

Shape legend: N images drawn, Q queries of a sheet, k neighbours.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.audit.config import AuditConfig
from eval.audit.run import Audit, Sheet
from eval.config import FeaturesConfig
from train.errors import TrainingError
from train.files import write_text_atomically

PARTS = (
    "accuracy",
    "classes",
    "subgroups",
    "invariance",
    "leaks",
    "dimensions",
    "drift",
    "may_be_silent",
    "verdict",
    "left_out",
)


def audit_record(found: Audit, config: AuditConfig, features: FeaturesConfig) -> dict[str, Any]:
    """Plain data for JSON: everything that was found, but for the pixels."""
    drawn = found.drawn
    neighbours = {
        "mean_similarity": found.mean_similarity,
        "same_class_share": found.same_class_share,
        "by_class": _sheet_record(found, found.by_class),
        "worst": _sheet_record(found, found.worst) if found.worst else None,
    }
    data = {"path": str(drawn.path), "images": len(drawn.whole), "looked_at": len(drawn)}
    return {
        "settings": {"audit": config.model_dump(mode="json"), "features": features.model_dump(mode="json")},
        "data": data | {"classes": len(drawn.classes)},
        "neighbours": neighbours,
        **{name: _plain(getattr(found, name)) for name in PARTS},
    }


def prepare(out: Path) -> None:
    """Make the folder, before the work. Raises `TrainingError` where one cannot write to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error.strerror) from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise _unwritable(out, "no permission")


def write_audit(record: Mapping[str, Any], page: str, out: Path) -> None:
    """Write audit.json and audit.html into the folder `out`. Raises `TrainingError` where that fails."""
    try:
        write_text_atomically(out / "audit.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
        write_text_atomically(out / "audit.html", page)
    except OSError as error:
        raise _unwritable(out, error.strerror) from error


def _unwritable(out: Path, reason: str | None) -> TrainingError:
    return TrainingError(f"Cannot write the audit to {out}: {reason}; choose another place with --out.")


def _sheet_record(found: Audit, sheet: Sheet) -> list[dict[str, Any]]:
    """One entry per query: numbers in the dataset, from 0."""
    number, names, labels_N = found.drawn.indices_N, found.drawn.classes, found.drawn.labels_N
    return [
        {
            "query": int(number[query]),
            "name": found.drawn.name(query),
            "class": names[labels_N[query]] if names else None,
            "neighbours": number[neighbours].tolist(),
            "similarities": similarities,
            "classes": [names[label] for label in labels_N[neighbours]] if names else None,
        }
        for query, neighbours, similarities in zip(
            sheet.queries_Q.tolist(),
            sheet.neighbours_Qk.tolist(),
            sheet.similarities_Qk.tolist(),
            strict=True,
        )
    ]


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, wherever they are."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
