"""What an evaluation found, in the form that all protocols share."""

from dataclasses import dataclass
from typing import Any

from pipelines.source import Source


@dataclass(frozen=True)
class DataSummary:
    """Which images an evaluation learned from, or was measured on."""

    path: str
    images: int
    classes: int


@dataclass(frozen=True)
class EvalResult:
    """What was measured and how; `dataclasses.asdict` gives plain data for JSON.

    `data` is by role ("train", "test"). `figures` are shares from 0 to 1: top1, top5, mAP and so on.
    """

    protocol: str
    settings: dict[str, Any]
    data: dict[str, DataSummary]
    figures: dict[str, float]


def summary(source: Source) -> DataSummary:
    """Of a labelled dataset."""
    return DataSummary(str(source.path), len(source), len(source.classes))
