"""What a converted dataset holds and where it comes from: the JSON file that lies with it.

Shape legend: N samples.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from pipelines.config import Section
from pipelines.errors import DataError

MAX_STORED_SIDE = 4096
_LONGER_SIDES = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096)

_OWN_CHECKSUM = "manifest_sha256"
Count = Annotated[int, Field(ge=0)]


class ConvertSettings(Section):
    """How the images are stored."""

    max_side: Annotated[
        int,
        Field(ge=16, le=MAX_STORED_SIDE, description="Larger images are shrunk to this longer side, pixels."),
    ] = 512
    quality: Annotated[
        int, Field(ge=1, le=100, description="JPEG quality of images that are encoded anew.")
    ] = 90
    storage: Annotated[
        Literal["jpg", "raw", "mixed"],
        Field(description="JPEG files, raw pixels, or pixels where a JPEG would save little."),
    ] = "jpg"
    raw_factor: Annotated[
        float,
        Field(
            ge=1,
            allow_inf_nan=False,
            description="With mixed: raw where the pixels take at most this many times the JPEG.",
        ),
    ] = 2.0
    check: Annotated[
        Literal["structure", "decode"],
        Field(description="What a JPEG that is copied must pass: a walk through its parts, or decoding."),
    ] = "structure"


class LeftOut(Section):
    """A file of the source that is not in the dataset."""

    file: str = Field(description="Path inside the source.")
    reason: str


class Block(Section):
    """Consecutive bytes of a file, their checksum, and the samples that end in them.

    In a shard every block starts at 0, so that the last one's checksum is that of the whole file.
    """

    start: Count
    end: Count
    samples: Count
    sha256: str


class StoredFile(Section):
    """One file of the dataset. Its blocks cover it."""

    file: str = Field(description="Name inside the folder of the manifest.")
    bytes: Count
    samples: Count
    sha256: str | None = Field(description="As sha256sum gives it; null where only blocks have one.")
    blocks: tuple[Block, ...]


class SizeSummary(Section):
    """Heights and widths of the stored images, in pixels."""

    min_height: Count
    min_width: Count
    mean_height: float
    mean_width: float
    max_height: Count
    max_width: Count
    longer_side: dict[int, Count] = Field(
        description="Images by longer side; the key is the greatest side, the next smaller key excluded."
    )


class Manifest(Section):
    """The contents of one dataset. Sample labels are positions in `classes`."""

    format: Literal[3] = 3
    source: str = Field(description="Absolute path of what was converted.")
    source_kind: str
    source_fingerprint: str = Field(description="SHA-256 over names, labels and sizes in the source.")
    created: datetime
    seconds: float = Field(description="Time that the conversion took, over all its runs.")
    settings: ConvertSettings
    versions: dict[str, str] = Field(description="Software that wrote the dataset.")
    sha256: str = Field(description="Over the checksums of all blocks: names this very dataset.")
    images: Count
    images_copied: Count = Field(description="Stored as the source's own bytes; the others are encoded anew.")
    images_raw: Count = Field(description="Stored as pixels.")
    image_bytes: Count = Field(description="Sum over the stored images, without the format's own bytes.")
    sizes: SizeSummary
    unlabelled: bool = Field(description="True: the source has no labels, and every label is 0.")
    classes: tuple[str, ...]
    images_per_class: dict[str, Count]
    left_out: tuple[LeftOut, ...]
    ignored: Count = Field(description="Other files in the source, whose names are not those of images.")
    files: tuple[StoredFile, ...]

    @property
    def share_left_out(self) -> float:
        """Of the files in the source, those that are not in the dataset."""
        return len(self.left_out) / (self.images + len(self.left_out))


def summarise_sizes(height_N: np.ndarray, width_N: np.ndarray) -> SizeSummary:
    """`height_N`, `width_N`: integers, at least one."""
    longer_N = np.maximum(height_N, width_N)
    edges = np.array([*_LONGER_SIDES, max(2**16, int(longer_N.max()))])
    place_N = np.searchsorted(edges, longer_N)
    places, counts = np.unique(place_N, return_counts=True)
    return SizeSummary(
        min_height=int(height_N.min()),
        min_width=int(width_N.min()),
        mean_height=round(float(height_N.mean()), 2),
        mean_width=round(float(width_N.mean()), 2),
        max_height=int(height_N.max()),
        max_width=int(width_N.max()),
        longer_side={int(edges[place]): int(count) for place, count in zip(places, counts, strict=True)},
    )


def digest_of(files: Iterable[StoredFile]) -> str:
    """The SHA-256 that names a dataset."""
    digest = hashlib.sha256()
    for file in files:
        for block in file.blocks:
            digest.update(f"{file.file} {block.start} {block.end} {block.sha256}\n".encode())
    return digest.hexdigest()


def manifest_path(dataset: Path) -> Path:
    """Where a dataset's manifest lies: `x.manifest.json` beside `x.beton`, `manifest.json` among shards."""
    return dataset.with_suffix(".manifest.json") if dataset.suffix == ".beton" else dataset / "manifest.json"


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest as indented JSON with its own checksum, `manifest_sha256`.

    That is the SHA-256 of the other content as JSON without blanks, keys sorted, in ASCII. Raises `OSError`
    where the disk does not take it.
    """
    content = manifest.model_dump(mode="json")
    content |= {_OWN_CHECKSUM: _checksum_of(content)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _checksum_of(content: Mapping[str, object]) -> str:
    """What `save_manifest` adds to this content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_manifest(dataset: Path) -> Manifest:
    """The manifest of the dataset at this path.

    Raises `DataError` where it is missing, unreadable, of another version, or not what was written.
    """
    path = manifest_path(dataset)
    try:
        content = json.loads(path.read_bytes())
        stated = content.pop(_OWN_CHECKSUM, None)
        manifest = Manifest.model_validate_json(json.dumps(content))
    except NotADirectoryError as error:
        raise DataError(
            f"{dataset} is no dataset; give a .beton file, or a folder that fastbarlow convert has written."
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            f"There is no manifest {path}; give a dataset that fastbarlow convert has written."
        ) from error
    except OSError as error:
        raise DataError(
            f"The manifest {path} cannot be read ({error.strerror}); check its permissions."
        ) from error
    except (ValueError, AttributeError) as error:  # not JSON, no table, or other fields
        raise DataError(
            f"{path} is not a manifest of this version of fastbarlow; convert the images again."
        ) from error
    if stated != _checksum_of(content):
        raise DataError(f"The manifest {path} is damaged or was edited; copy the dataset again.")
    return manifest
