"""What the distortions are compared with: the authors' transform, torchvision's newer one, and Kornia.

Each draws its random numbers itself, as its users have it, from the same distributions as ours. Crops are
left out everywhere.

Shape legend: V views (2), N samples, C channels (3), H = W image size in pixels.
"""

import math
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from types import TracebackType

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from pipelines.config import AugmentConfig, ViewConfig
from pipelines.errors import DataError
from tools.processes import PROCESSES

SAMPLES_AT_ONCE = 4  # handed to a worker together
MIDDLE = 128  # of the range of 8-bit values, from where on solarizing inverts
GAUSSIAN_REACH = 4  # taps on either side, in sigmas, where a blur has taps


def authors_transform(view: ViewConfig, config: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    """From an RGB crop to float32 (C, H, W), as the authors' code has it: PIL on one image at a time."""
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(view.flip_p),
            transforms.RandomApply([transforms.ColorJitter(**_strengths(view))], view.jitter_p),
            transforms.RandomGrayscale(view.grayscale_p),
            transforms.RandomApply([_PilBlur(*view.blur_sigma)], view.blur_p),
            transforms.RandomSolarize(MIDDLE, view.solarize_p),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )


class AuthorsWorkers:
    """The authors' transform in as many processes as asked for, one thread each, kept until the block ends.

    Other than with their `DataLoader`, the results stay in the processes, which is quicker.
    """

    def __init__(self, views_VNHWC: Tensor, config: AugmentConfig, processes: int) -> None:
        self._num_samples = views_VNHWC.shape[1]
        self._pool = ProcessPoolExecutor(
            processes, PROCESSES, initializer=_start_worker, initargs=(views_VNHWC.share_memory_(), config)
        )

    def __enter__(self) -> "AuthorsWorkers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self) -> Tensor:
        """Distort both views of every sample; returns the sum of each, (N, V) float64.

        Raises `DataError` where a process dies.
        """
        try:
            sums = self._pool.map(_distort_sample, range(self._num_samples), chunksize=SAMPLES_AT_ONCE)
            return torch.tensor(list(sums), dtype=torch.float64)
        except BrokenProcessPool as error:
            raise DataError(
                "A worker process of the authors' transform died; free some memory, then try again."
            ) from error


_worker: list[tuple[Callable[[Image.Image], Tensor], list[Image.Image]]]  # each view's transform and images


def _start_worker(views_VNHWC: Tensor, config: AugmentConfig) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = [
        (authors_transform(view, config), [Image.fromarray(image_HWC.numpy()) for image_HWC in view_NHWC])
        for view, view_NHWC in zip(config.views, views_VNHWC, strict=True)
    ]


def _distort_sample(n: int) -> list[float]:
    return [transform(images[n]).sum().item() for transform, images in _worker]


class _PilBlur:
    def __init__(self, low: float, high: float) -> None:
        self._range = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self._range)))


def torchvision_v2(views_VNCHW: Tensor, config: AugmentConfig) -> Callable[[], list[list[Tensor]]]:
    """A call that distorts uint8 views one by one, on their device, to float32 (C, H, W)."""
    both = [
        v2.Compose(
            [
                v2.RandomHorizontalFlip(view.flip_p),
                v2.RandomApply([v2.ColorJitter(**_strengths(view))], view.jitter_p),
                v2.RandomGrayscale(view.grayscale_p),
                v2.RandomApply([v2.GaussianBlur(_taps(view), view.blur_sigma)], view.blur_p),
                v2.RandomSolarize(MIDDLE, view.solarize_p),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config.mean, config.std),
            ]
        )
        for view in config.views
    ]
    return lambda: [[t(image) for image in view] for t, view in zip(both, views_VNCHW, strict=True)]


def kornia(views_VNCHW: Tensor, config: AugmentConfig) -> Callable[[], list[Tensor]] | None:
    """A call that distorts each view as a batch, to float32 (N, C, H, W); None where it is not installed."""
    if find_spec("kornia") is None:
        return None
    from kornia import augmentation as k

    both = [
        nn.Sequential(
            k.RandomHorizontalFlip(p=view.flip_p),
            k.ColorJitter(**_strengths(view), p=view.jitter_p),
            k.RandomGrayscale(p=view.grayscale_p),
            k.RandomGaussianBlur((_taps(view),) * 2, view.blur_sigma, "replicate", p=view.blur_p),
            k.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=view.solarize_p),
            k.Normalize(torch.tensor(config.mean), torch.tensor(config.std)),
        ).to(views_VNCHW.device)
        for view in config.views
    ]
    return lambda: [t(view.float().div_(255)) for t, view in zip(both, views_VNCHW, strict=True)]


def _strengths(view: ViewConfig) -> dict[str, float]:
    return {name: getattr(view, name) for name in ("brightness", "contrast", "saturation", "hue")}


def _taps(view: ViewConfig) -> int:
    """Of a Gaussian with the largest sigma."""
    return 2 * math.ceil(GAUSSIAN_REACH * view.blur_sigma[1]) + 1
