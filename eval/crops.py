"""The images of the authors' evaluate.py: centre crops to test on, random crops to learn from.

Shape legend: N samples, C colours (3), S side of a crop in pixels, T tries of a crop.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as tv

from eval.config import FeaturesConfig
from pipelines.config import ViewConfig
from pipelines.draw import random_resized_crop
from pipelines.draw_formulas import BLOCK_SWITCHES, CROP_TRIES, view_spec
from pipelines.errors import DataError
from pipelines.random_bits import philox_u32, uniform
from pipelines.source import Source, read_image
from pipelines.workers import deaths_explained, start_worker, stop_workers, taken

STREAM_CROPS = 0xFFFFFFFE  # counter word that neither a view of the pretraining nor its order uses
_ADVICE = "lower eval.features.workers or eval.features.batch_size"


class PreparedImages(Dataset):
    """Sample i as uint8 (C, S, S) after `transforms`, or as the `DataError` that tells why there is none.

    Errors travel as values because a DataLoader turns a worker's exception into a page of traceback.
    """

    def __init__(self, source: Source, *transforms: nn.Module) -> None:
        self._source = source
        self._transform = v2.Compose([*transforms, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Tensor | DataError:
        try:
            return self._transform(read_image(self._source, index))
        except DataError as error:
            return error


class CentreCrops(PreparedImages):
    """The short side is resized first (PIL's bilinear, which filters against aliasing)."""

    def __init__(self, source: Source, config: FeaturesConfig) -> None:
        super().__init__(source, v2.Resize(config.resize), v2.CenterCrop(config.image_size))


class RandomCrops(Dataset):
    """Sample i as a uint8 random crop (C, S, S), or as the `DataError` that tells why there is none.

    torchvision's `RandomResizedCrop` with its defaults (PIL's bilinear) and `RandomHorizontalFlip`. What is
    drawn is a pure function of (seed, epoch, sample): any number of ranks and workers, and an evaluation that
    goes on after a stop, see the same crops.
    """

    def __init__(self, source: Source, config: FeaturesConfig, seed: int, epoch: int) -> None:
        self._source, self._side = source, config.image_size
        self._seed, self._epoch = seed, epoch
        self._spec = view_spec(ViewConfig())  # torchvision's ranges of area and aspect ratio

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Tensor | DataError:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor | DataError]:
        """A whole batch, whose numbers are drawn in one go; `DataLoader` asks for it where there is one."""
        try:
            boxes_N4, flip_N = self.draw(np.asarray(indices))
        except DataError as error:
            return [error] * len(indices)
        return [self._crop(*of_one) for of_one in zip(indices, boxes_N4, flip_N, strict=True)]

    def draw(self, indices_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 (N, 4) boxes (top, left, height, width), and bool (N,) whether to flip.

        Raises `DataError` where an image's size cannot be read.
        """
        blocks_B1 = np.arange(BLOCK_SWITCHES + 1)[:, None]
        u_4BN = uniform(philox_u32(self._seed, indices_N, self._epoch, STREAM_CROPS, blocks_B1))
        boxes_N4 = random_resized_crop(self._spec, u_4BN[:, :CROP_TRIES], *self._source.sizes(indices_N))
        return boxes_N4, u_4BN[0, BLOCK_SWITCHES] < self._spec.flip_p

    def _crop(self, index: int, box_4: np.ndarray, flip: bool) -> Tensor | DataError:
        try:
            image = read_image(self._source, index)
        except DataError as error:
            return error
        crop = tv.resized_crop(image, *box_4.tolist(), [self._side] * 2, InterpolationMode.BILINEAR)
        return tv.pil_to_tensor(tv.hflip(crop) if flip else crop)


@contextmanager
def loading(
    crops: Dataset, batches: Sequence[Sequence[int]], config: FeaturesConfig, device: torch.device
) -> Iterator[Iterator[Tensor]]:
    """The uint8 crops (N, C, S, S) of these batches of samples, one after the other, from worker processes.

    Raises `DataError`, inside and at the consumer's, where an image cannot be read or a worker dies.
    """
    loader = DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=config.workers,
        collate_fn=_stack,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # for the seeds of workers that draw nothing; else the global one
    )
    with deaths_explained(_ADVICE), ExitStack() as at_the_end:
        found = iter(loader)
        at_the_end.callback(stop_workers, found)
        yield _readable(taken(found, _ADVICE))


def _readable(found: Iterator[Tensor | DataError]) -> Iterator[Tensor]:
    for crops_NCSS in found:
        if isinstance(crops_NCSS, DataError):
            raise crops_NCSS
        yield crops_NCSS


def _stack(crops: list[Tensor | DataError]) -> Tensor | DataError:
    """(N, C, S, S), or the first error."""
    return next((crop for crop in crops if isinstance(crop, DataError)), None) or torch.stack(crops)
