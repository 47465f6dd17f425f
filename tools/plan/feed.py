"""What it takes to feed the GPUs: cores that decode and crop, and bytes from the storage."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.source import open_source
from pipelines.source.torchvision_dataset import TORCHVISION
from tools.convert.manifest import load_manifest, manifest_path
from tools.plan.profiles import Measured
from train.config import RunConfig

IMAGENET_IMAGES, IMAGE_BYTES = 1_281_167, 110e3
# Pairs of both 224-pixel crops that one core makes in a second from ImageNet photographs, by loader; and of
# this work, what does not depend on the crops' size: images decoded by one core.
CROPS_PER_CORE = {"folder": 255, "ffcv": 675, "dali": 683}
DECODED_PER_CORE, TABLE = 992, "tools/bench/results/2026-11-20-cpu.md"


@dataclass(frozen=True)
class Dataset:
    """How many images the recipe trains on, and how large their files are."""

    images: int
    image_bytes: float
    source: str


def describe_dataset(path: Path) -> Dataset:
    """By the manifest of the dataset at `path`, else by looking at it, else ImageNet's figures.

    Raises `DataError` where there is a dataset that cannot be read.
    """
    if manifest_path(path).is_file():
        manifest = load_manifest(path)
        return Dataset(
            manifest.images, manifest.image_bytes / max(1, manifest.images), str(manifest_path(path))
        )
    assumed = f"{IMAGE_BYTES / 1e3:g} KB an image assumed"
    if not path.exists() and not str(path).startswith(TORCHVISION):
        return Dataset(IMAGENET_IMAGES, IMAGE_BYTES, f"ImageNet's, as there is none at {path}; {assumed}")
    return Dataset(len(open_source(path)), IMAGE_BYTES, f"{path}; {assumed}")


@dataclass(frozen=True)
class Feed:
    """Of one GPU, in pairs per second."""

    per_core: float | None  # None where nothing is decoded
    limit: float  # at most; infinite where nothing limits
    limited_by: str  # "workers" or "cores"
    source: str

    def cores(self, pairs_per_second: float) -> float:
        """Cores that keep busy with that many pairs."""
        return pairs_per_second / self.per_core if self.per_core else 0.0


def describe_feed(config: RunConfig, cores: int | None, profiles: list[Measured]) -> Feed:
    """`cores`: of the host for each GPU, or None for as many as are asked for."""
    data = config.data
    if data.loader == "synthetic":
        return Feed(None, float("inf"), "workers", "nothing is decoded")
    measured = next((m for m in profiles if m.pairs_per_core), None)
    if measured is not None:
        per_core, source = measured.pairs_per_core, str(measured.path)
    else:
        per_core, source = _per_core(data.loader, data.image_size), f"{TABLE}, photographs of 105 KB"
        if data.loader == "dali" and data.dali.device != "cpu":
            source += "; decoding on the CPU, as DALI's on the GPU has not been measured"
    threads = max(1, data.workers)
    limited_by = "workers"
    if cores is not None and cores < threads:
        threads, limited_by = cores, "cores"
    return Feed(per_core, threads * per_core, limited_by, source)


def _per_core(loader: str, size: int) -> float:
    """The decoding stays as it is for other sizes of crops; the rest follows their area."""
    whole = 1 / CROPS_PER_CORE[loader]
    decoding = whole * CROPS_PER_CORE["ffcv"] / DECODED_PER_CORE  # the same share for every loader
    return 1 / (decoding + (whole - decoding) * (size / 224) ** 2)
