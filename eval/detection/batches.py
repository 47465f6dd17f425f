"""Which images an iteration learns from, and the worker processes that decode them.

As in pretraining this is arithmetic: image and flip of the n-th sample depend on the seed and n alone, so a
run that goes on takes the samples that an uninterrupted one would have taken.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from eval.detection.config import DetectionConfig
from eval.detection.images import AnnotatedImages, Sample, read_sample
from pipelines.errors import DataError
from pipelines.order import epoch_permutation
from pipelines.workers import deaths_explained, start_worker, stop_workers, taken

ADVICE = "lower --workers"
Draw = tuple[int, bool]  # index of an image, and whether it is mirrored


def training_batches(
    images: AnnotatedImages, config: DetectionConfig, iterations: Iterable[int], rank: int, world_size: int
) -> Iterator[list[Sample]]:
    """This rank's samples of each of these iterations, counted from 0.

    Sample n is the n-th of one permutation of the images after another; an iteration takes as many as the
    batch, and every rank an equal slice of them. Raises `DataError` where the batch cannot be split evenly,
    an image cannot be read, or a worker dies.
    """
    if config.batch_size % world_size:
        raise DataError(
            f"The batch of {config.batch_size} images cannot be split evenly over {world_size} processes; "
            f"make --batch-size a multiple of {world_size}."
        )
    return _loaded(images, _draws(len(images), config, iterations, rank, world_size), config.workers)


def images_to_test(images: AnnotatedImages, workers: int, rank: int, world_size: int) -> Iterator[Sample]:
    """Every `world_size`-th image from the `rank`-th one on."""
    draws = ([(index, False)] for index in range(rank, len(images), world_size))
    for (sample,) in _loaded(images, draws, workers):
        yield sample


def _draws(
    num_images: int, config: DetectionConfig, iterations: Iterable[int], rank: int, world_size: int
) -> Iterator[list[Draw]]:
    share = config.batch_size // world_size
    epoch, order = -1, np.empty(0, np.int64)
    for iteration in iterations:
        draws = []
        start = iteration * config.batch_size + rank * share
        for n in range(start, start + share):
            if n // num_images != epoch:
                epoch = n // num_images
                order = epoch_permutation(num_images, config.seed, epoch)
            flip = bool(np.random.default_rng((config.seed, n)).random() < 0.5)
            draws.append((int(order[n % num_images]), flip))
        yield draws


def _loaded(images: AnnotatedImages, draws: Iterable[list[Draw]], workers: int) -> Iterator[list[Sample]]:
    loader = DataLoader(
        _Samples(images),
        batch_size=None,  # a list of draws is a whole batch
        sampler=draws,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    batches = iter(loader)
    with deaths_explained(ADVICE), ExitStack() as at_the_end:
        at_the_end.callback(stop_workers, batches)
        for samples in taken(batches, ADVICE):
            if isinstance(samples, DataError):
                raise samples
            yield samples


class _Samples(Dataset):
    """By a list of draws the samples, or the `DataError` that tells why there are none."""

    def __init__(self, images: AnnotatedImages) -> None:
        self._images = images

    def __getitem__(self, draws: list[Draw]) -> list[Sample] | DataError:
        try:
            return [read_sample(self._images[index], flip) for index, flip in draws]
        except DataError as error:
            return error


def _as_is(samples: list[Sample] | DataError) -> list[Sample] | DataError:
    return samples
