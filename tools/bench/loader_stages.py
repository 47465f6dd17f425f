"""The stages of a loader, each alone on the same cores: decode, crop, augment and, for a GPU, copy.

Shape legend: V views (2), N samples, S image size in pixels, E epochs, M images of the sample.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle, islice

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import distort
from pipelines.batch import NUM_VIEWS
from pipelines.config import AugmentConfig
from pipelines.decode_numba import decode, image_size
from pipelines.draw import draw_views
from pipelines.errors import DataError
from pipelines.resize_numba import crop_and_resize
from pipelines.source import Source
from tools.bench.loader_measure import Contender, Setting
from tools.bench.timing import MIN_WARMUP

MAX_IMAGES, MAX_BYTES = 1000, 256 << 20  # of the sample, decoded
EPOCHS = 8  # of crop boxes, which then come again
IMAGES_AT_ONCE = 8  # handed to a thread together: handing over then costs next to nothing
PORTIONS_AHEAD = 4  # for each thread


@dataclass(frozen=True)
class Sample:
    """JPEGs at equal distances in a dataset, held in memory."""

    jpegs: list[np.ndarray] = field(default_factory=list)  # uint8 (num_bytes,)
    images: list[np.ndarray] = field(default_factory=list)  # uint8 (height, width, 3)


def draw_sample(source: Source) -> Sample:
    """Those that libjpeg-turbo decodes without complaint. Raises `DataError` where there are none."""
    sample, num_bytes = Sample(), 0
    for index in np.linspace(0, len(source) - 1, min(len(source), MAX_IMAGES)).round().astype(np.int64):
        jpeg = np.ascontiguousarray(source.encoded(index))
        pixels_HW3 = np.empty((*image_size(jpeg), 3), np.uint8)
        num_bytes += pixels_HW3.nbytes
        if sample.jpegs and num_bytes > MAX_BYTES:
            break
        if pixels_HW3.size and decode(jpeg, pixels_HW3) == 0:
            sample.jpegs.append(jpeg)
            sample.images.append(pixels_HW3)
    if not sample.jpegs:
        raise DataError(f"{source.path} holds no JPEG that libjpeg-turbo decodes; convert the images first.")
    return sample


def stages(sample: Sample, setting: Setting) -> list[Contender]:
    """Decode once, crop twice, distort both views and, for a GPU, copy both crops.

    The first two run on as many threads as there are workers, the third as `distort` does.
    """
    boxes_EVM4 = _boxes(sample, setting.augment)
    crops_VNSS3 = _crops(sample, boxes_EVM4, setting)
    of_threads = {"pairs": IMAGES_AT_ONCE, "warmup": 2 * PORTIONS_AHEAD * setting.workers}
    of_batches = {"pairs": setting.batch_size, "warmup": MIN_WARMUP}
    decoding = partial(_in_threads, _Decoder(sample), setting.workers)
    cropping = partial(_in_threads, partial(_crop, sample, boxes_EVM4, setting.image_size), setting.workers)
    found = [
        Contender("decode", "pixels", decoding, **of_threads),
        Contender("crop", "crops", cropping, **of_threads),
        Contender("augment", "views", partial(_distorted, crops_VNSS3, setting), **of_batches),
    ]
    if setting.device.type == "cuda":
        found.append(Contender("copy", "crops", partial(_copied, crops_VNSS3, setting), **of_batches))
    return found


def _boxes(sample: Sample, config: AugmentConfig) -> np.ndarray:
    """int32 (E, V, M, 4): top, left, height, width of the crops."""
    heights_M, widths_M = np.array([image.shape[:2] for image in sample.images]).T
    indices_M = np.arange(len(sample.images))
    epochs = [
        draw_views(config.views, 0, epoch, indices_M, heights_M, widths_M).box_VN4 for epoch in range(EPOCHS)
    ]
    return torch.stack(epochs).numpy()


def _crops(sample: Sample, boxes_EVM4: np.ndarray, setting: Setting) -> Tensor:
    """uint8 (V, N, S, S, 3): a batch of crops."""
    size = setting.image_size
    crops_VNSS3 = np.empty((NUM_VIEWS, setting.batch_size, size, size, 3), np.uint8)
    for v, n in np.ndindex(crops_VNSS3.shape[:2]):
        m = n % len(sample.images)
        crop_and_resize(sample.images[m], tuple(boxes_EVM4[0, v, m].tolist()), crops_VNSS3[v, n])
    return torch.from_numpy(crops_VNSS3)


class _Decoder:
    """Decodes the images by number, each thread into the same memory again and again."""

    def __init__(self, sample: Sample) -> None:
        self._sample, self._num_bytes = sample, max(image.size for image in sample.images)
        self._local = threading.local()

    def __call__(self, number: int) -> None:
        if not hasattr(self._local, "memory"):
            self._local.memory = np.empty(self._num_bytes, np.uint8)
        m = number % len(self._sample.jpegs)
        shape = self._sample.images[m].shape
        decode(self._sample.jpegs[m], self._local.memory[: math.prod(shape)].reshape(shape))


def _crop(sample: Sample, boxes_EVM4: np.ndarray, size: int, number: int) -> None:
    epoch, m = divmod(number, len(sample.images))
    crops_VSS3 = np.empty((NUM_VIEWS, size, size, 3), np.uint8)
    for v, box in enumerate(boxes_EVM4[epoch % EPOCHS, :, m].tolist()):
        crop_and_resize(sample.images[m], tuple(box), crops_VSS3[v])


@contextmanager
def _in_threads(work: Callable[[int], None], workers: int) -> Iterator[Iterator[None]]:
    """Call `work` with 0, 1, 2 ...; each item of the stream is a portion of calls that has been done."""

    def portion(first: int) -> None:
        for number in range(first, first + IMAGES_AT_ONCE):
            work(number)

    def stream() -> Iterator[None]:
        submitted = (pool.submit(portion, first) for first in count(0, IMAGES_AT_ONCE))
        pending = deque(islice(submitted, PORTIONS_AHEAD * workers))
        for future in submitted:
            pending.append(future)
            yield pending.popleft().result()

    with ThreadPoolExecutor(workers) as pool:
        try:
            yield stream()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _distorted(crops_VNSS3: Tensor, setting: Setting) -> Iterator[Iterator[Tensor]]:
    """Random numbers are drawn ahead, as the loaders do it."""
    views, device = setting.augment.views, setting.device
    indices_N, sides_N = np.arange(setting.batch_size), np.full(setting.batch_size, setting.image_size)
    numbers = [draw_views(views, 0, epoch, indices_N, sides_N, sides_N).to(device) for epoch in range(EPOCHS)]
    crops_VNSS3 = crops_VNSS3.to(device)
    yield (distort(crops_VNSS3, params, setting.augment, torch.float32) for params in cycle(numbers))


@contextmanager
def _copied(crops_VNSS3: Tensor, setting: Setting) -> Iterator[Iterator[Tensor]]:
    source_VNSS3 = crops_VNSS3.pin_memory()
    target_VNSS3 = torch.empty_like(crops_VNSS3, device=setting.device)
    yield (target_VNSS3.copy_(source_VNSS3, non_blocking=True) for _ in count())
