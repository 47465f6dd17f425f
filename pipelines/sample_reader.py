"""Reads the samples of a batch one by one, and others in the places of those that cannot be read."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.bad_samples import BadSamples
from pipelines.batch import Batch, ViewParams
from pipelines.epoch_loader import LoaderJob
from pipelines.errors import DataError
from pipelines.source import Source, read_image
from pipelines.source.base import MAX_PIXELS


class SampleReader:
    """The numbers and images of samples; what it finds unreadable it reports to `bad`."""

    def __init__(self, source: Source, job: LoaderJob, bad: BadSamples) -> None:
        self._source, self._job, self._bad = source, job, bad

    def draw(self, epoch: int, indices_N: np.ndarray) -> tuple[np.ndarray, ViewParams]:
        """Their numbers, and the samples themselves: stand-ins for those that are known to be bad by then."""
        while True:
            indices_N = self._bad.stand_ins(indices_N)
            try:
                sizes = self._sizes(indices_N)
            except DataError:
                if not self._bad.find(lambda index: self._sizes(np.array([index])), indices_N.tolist()):
                    raise
            else:
                return indices_N, self._job.draw(epoch, indices_N, *sizes)

    def image(
        self, n: int, epoch: int, indices_N: np.ndarray, params: ViewParams
    ) -> tuple[Image.Image, np.ndarray, ViewParams]:
        """The image of sample n, and `indices_N` and `params`, which change at n where another stands in."""
        while True:
            index = int(indices_N[n])
            try:
                return read_image(self._source, index), indices_N, params
            except DataError as error:
                self._bad.report(index, error)
            indices_N, params = self.draw(epoch, indices_N)

    def batch(self, views_VNHWC: Tensor, params: ViewParams, indices_N: np.ndarray) -> Batch:
        """With the samples' labels, on the CPU."""
        labels_N = torch.from_numpy(self._source.labels(indices_N))
        return Batch(views_VNHWC, params, labels_N, torch.from_numpy(indices_N))

    def _sizes(self, indices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raises `DataError` as the source does, and where PIL would refuse what other decoders might not."""
        heights_K, widths_K = self._source.sizes(indices_K)
        too_large_K = heights_K.astype(np.int64) * widths_K > MAX_PIXELS
        if too_large_K.any():
            raise DataError(
                f"The image {self._source.name(int(indices_K[too_large_K.argmax()]))} has more than "
                f"{MAX_PIXELS:,} pixels; make it smaller or remove it, and convert the images again."
            )
        return heights_K, widths_K
