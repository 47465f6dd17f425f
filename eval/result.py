"""What an evaluation found, in the form that all protocols share."""

from dataclasses import dataclass, field
from typing import Any

from pipelines.source import Source, Voc07Source
from pipelines.source.voc import VOC_CLASSES


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
    `classes` are those of each class, and how they were found, where a protocol tells.
    """

    protocol: str
    settings: dict[str, Any]
    data: dict[str, DataSummary]
    figures: dict[str, float]
    classes: dict[str, dict[str, float]] = field(default_factory=dict)


def summary(source: Source) -> DataSummary:
    """Of a labelled dataset, with one class of each image or any number of them."""
    classes = VOC_CLASSES if isinstance(source, Voc07Source) else source.classes
    return DataSummary(str(source.path), len(source), len(classes))
