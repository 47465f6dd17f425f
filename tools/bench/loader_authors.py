"""The authors' data path, to compare with: their transform in the workers of torch's `DataLoader`.

Every image is a file of its own, decoded once and cropped, distorted and normalised twice, by PIL.

Shape legend: N samples, C channels (3), H = W = S image size in pixels.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, RandomResizedCrop

from pipelines.config import AugmentConfig
from pipelines.errors import DataError
from pipelines.source import FolderSource, Source
from pipelines.workers import LOST_WORKER, start_worker, stop_workers
from tools.bench.augment_peers import authors_transform
from tools.bench.loader_measure import Contender, Setting

AUTHORS = "authors"
PREFETCH = 2  # batches per worker: the default of torch's `DataLoader`, which the authors keep
MAX_FILES = 5000  # of a larger dataset, images at equal distances are written out

Views = tuple[Tensor, Tensor]


class TwoViews:
    """From an RGB image to both of its views, float32 (C, S, S), normalised; all chance is torch's own."""

    def __init__(self, config: AugmentConfig, size: int) -> None:
        self._transforms = [
            Compose(
                [
                    RandomResizedCrop(size, view.crop_scale, view.crop_ratio, InterpolationMode.BICUBIC),
                    authors_transform(view, config),
                ]
            )
            for view in config.views
        ]

    def __call__(self, image: Image.Image) -> Views:
        view_a, view_b = (transform(image) for transform in self._transforms)
        return view_a, view_b


@contextmanager
def image_folder(source: Source) -> Iterator[Path]:
    """The folder of `source`, or its images as files in a temporary one that is removed afterwards.

    Raises `DataError` where they are stored as raw pixels or cannot be written.
    """
    if isinstance(source, FolderSource):
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="fastbarlow-bench-") as temporary:
        root = Path(temporary)
        chosen = np.linspace(0, len(source) - 1, min(len(source), MAX_FILES)).round().astype(np.int64)
        for index in chosen:
            file = root / str(source.labels_N[index]) / f"{index:08}.jpg"
            try:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(source.encoded(index))
            except OSError as error:
                raise DataError(
                    f"The images cannot be written to {file.parent} ({error.strerror}); set TMPDIR to a "
                    "folder with more room."
                ) from error
        yield root


def authors_loader(folder: Path, setting: Setting) -> Contender:
    """Batches of both views on the device, (N, C, S, S) each."""
    return Contender(
        AUTHORS,
        "views",
        partial(_stream, folder, setting),
        pairs=setting.batch_size,
        warmup=PREFETCH * setting.workers + 1,
        cycle=setting.workers,
    )


@contextmanager
def _stream(folder: Path, setting: Setting) -> Iterator[Iterator[Views]]:
    """An epoch of theirs ends with all workers, which is not measured: the order goes on and on."""
    images = ImageFolder(str(folder), TwoViews(setting.augment, setting.image_size))
    loader = DataLoader(
        images,
        setting.batch_size,
        sampler=_EndlessOrder(len(images)),
        num_workers=setting.workers,
        prefetch_factor=PREFETCH,
        pin_memory=setting.device.type == "cuda",
        worker_init_fn=start_worker,
    )
    batches = iter(loader)
    try:
        yield _deliver(batches, setting.device)
    finally:
        stop_workers(batches)


def _deliver(batches: Iterator[tuple[list[Tensor], Tensor]], device: torch.device) -> Iterator[Views]:
    try:
        for (view_a, view_b), _ in batches:
            yield view_a.to(device, non_blocking=True), view_b.to(device, non_blocking=True)
    except (OSError, SyntaxError, ValueError, *LOST_WORKER) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise DataError(
            f"The authors' loader failed ({reason}); use fewer --workers, or leave bad images out with "
            "`fastbarlow convert`."
        ) from error


class _EndlessOrder(Sampler[int]):
    """All images in random order, again and again."""

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self._num_images).tolist()
