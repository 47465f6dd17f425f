"""What is in a dataset: counts, sizes, classes, storage.

Shape legend: N samples.
"""

from datetime import datetime
from pathlib import Path

import numpy as np
from pydantic import Field

from pipelines.config import Section
from pipelines.errors import DataError
from pipelines.source import BetonSource
from tools.convert.manifest import (
    ConvertSettings,
    Count,
    Manifest,
    SizeSummary,
    load_manifest,
    manifest_path,
    summarise_sizes,
)


class Provenance(Section):
    """Where a dataset comes from, if it has a manifest of this version."""

    source: str
    source_kind: str
    created: datetime
    settings: ConvertSettings
    versions: dict[str, str]
    sha256: str
    images_copied: Count
    left_out: Count


class Inspection(Section):
    """The contents of one dataset."""

    path: str
    format: str
    files: Count
    bytes: Count = Field(description="Of all files of the dataset.")
    image_bytes: Count
    images: Count
    images_jpg: Count
    images_raw: Count
    sizes: SizeSummary
    unlabelled: bool
    images_per_class: dict[str, Count]
    provenance: Provenance | None


def inspect(dataset: Path) -> Inspection:
    """Look into a `.beton` file, also one that FFCV has written, or a folder of shards.

    Raises `DataError` where it is neither of them or cannot be read.
    """
    if not dataset.exists():
        raise DataError(f"There is no dataset at {dataset}; give a .beton file or a folder of shards.")
    if dataset.suffix == ".beton":
        try:
            return _inspect_beton(dataset)
        except OSError as error:
            raise DataError(f"{dataset} cannot be read ({error.strerror}); check its permissions.") from error
    manifest = load_manifest(dataset)
    return Inspection(
        path=str(dataset),
        format="WebDataset shards",
        files=len(manifest.files),
        bytes=sum(file.bytes for file in manifest.files),
        image_bytes=manifest.image_bytes,
        images=manifest.images,
        images_jpg=manifest.images - manifest.images_raw,
        images_raw=manifest.images_raw,
        sizes=manifest.sizes,
        unlabelled=manifest.unlabelled,
        images_per_class=manifest.images_per_class,
        provenance=_provenance(manifest),
    )


def _inspect_beton(dataset: Path) -> Inspection:
    source = BetonSource(dataset)
    manifest = load_manifest(dataset) if manifest_path(dataset).exists() else None
    height_N, width_N = source.sizes(np.arange(len(source)))
    counts = np.bincount(source.labels_N, minlength=len(source.classes)).tolist()
    num_raw = int(source.is_raw_N.sum())
    return Inspection(
        path=str(dataset),
        format="FFCV's .beton, version 2",
        files=1,
        bytes=dataset.stat().st_size,
        image_bytes=int(source.num_bytes_N.sum()),
        images=len(source),
        images_jpg=len(source) - num_raw,
        images_raw=num_raw,
        sizes=summarise_sizes(height_N, width_N),
        unlabelled=not source.classes,
        images_per_class=dict(zip(source.classes, counts, strict=False)),
        provenance=_provenance(manifest) if manifest else None,
    )


def _provenance(manifest: Manifest) -> Provenance:
    copied = {name: getattr(manifest, name) for name in Provenance.model_fields if name != "left_out"}
    return Provenance(**copied, left_out=len(manifest.left_out))
