"""What a converted dataset holds: the JSON file beside the `.beton`, for people and for the tools."""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipelines.config import Section

Count = Annotated[int, Field(ge=0)]


class LeftOut(Section):
    """A file of the source that is not in the dataset."""

    file: str = Field(description="Path relative to the source folder.")
    reason: str


class ConvertSettings(Section):
    """How the images were stored."""

    max_side: int = Field(description="Larger images were shrunk to this longer side, in pixels.")
    quality: int = Field(description="JPEG quality of the stored images.")


class Manifest(Section):
    """The contents of one dataset file. Sample labels are positions in `classes`."""

    format: Literal[1] = 1
    source: str = Field(description="Absolute path of the folder that was converted.")
    created: datetime
    classes: tuple[str, ...]
    images: Count
    images_per_class: dict[str, Count]
    settings: ConvertSettings
    versions: dict[str, str] = Field(description="Software that wrote the dataset.")
    left_out: tuple[LeftOut, ...] = ()


def manifest_path(dataset: Path) -> Path:
    """Where the manifest of a dataset file lies: `x.manifest.json` beside `x.beton`."""
    return dataset.with_suffix(".manifest.json")


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest as indented JSON. Raises `OSError` where the disk does not take it."""
    path.write_text(json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
