"""kNN accuracy while the backbone trains, on images that are decoded once.

Shape legend: B images of the bank, Q to classify, N of either, C colours (3), S crop size in pixels,
F feature width.
"""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eval.config import EvalConfig, FeaturesConfig
from eval.crops import CentreCrops
from eval.features import features_of_crops
from eval.knn import knn_accuracy
from model.weights import Normalisation
from pipelines.errors import DataError
from pipelines.source import Source

MIN_IMAGES = 20  # of a dataset to train on: fewer would leave none to classify

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Crops:
    """Centre crops in the host's memory, and their labels."""

    pixels_NCSS: Tensor  # uint8
    labels_N: Tensor  # int64


class OnlineKnn:
    """Weighted kNN of a few images of `test`, among a few of `train`; see `OnlineConfig` for how many.

    Which ones depends on the number of images alone. Without `test`, those to classify are training images
    outside the bank: the network has seen them, but never their labels. Images that cannot be read are left
    out. The crops stay in the host's memory after the first call.

    There must be `MIN_IMAGES` training images. Raises `DataError` where the classes of the datasets differ.
    """

    def __init__(
        self, train: Source, test: Source | None, config: EvalConfig, normalisation: Normalisation
    ) -> None:
        if test is not None and test.classes != train.classes:
            raise DataError(
                f"The classes of eval.online.test_path {test.path} are not those of {train.path}; "
                f"set it to a dataset with the same classes."
            )
        self._train, self._test = train, test
        self._config, self._normalisation = config, normalisation
        self._crops: tuple[_Crops, _Crops] | None = None

    def accuracy(self, backbone: nn.Module) -> float:
        """Share (0 to 1) of right answers. `backbone`, on any device, and random numbers stay as they are."""
        if self._crops is None:
            self._crops = self._decode()
        backbone = copy.deepcopy(backbone).float().eval()
        device = next(backbone.parameters()).device
        bank, test = self._crops
        bank_BF, test_QF = (self._features(backbone, crops, device) for crops in (bank, test))
        knn = self._config.knn.model_copy(update={"k": min(self._config.knn.k, len(bank_BF))})
        return knn_accuracy(bank_BF, bank.labels_N, test_QF, test.labels_N, knn, device)

    def _decode(self) -> tuple[_Crops, _Crops]:
        """The bank and the images to classify."""
        online, count = self._config.online, len(self._train)
        order_N = _shuffled(count)
        size = min(online.knn_bank, count // 5)
        queries = min(online.knn_queries, count // 20)
        bank = _decode(self._train, order_N[:size], self._config.features)
        if self._test is None:
            return bank, _decode(self._train, order_N[size : size + queries], self._config.features)
        return bank, _decode(self._test, _shuffled(len(self._test))[:queries], self._config.features)

    def _features(self, backbone: nn.Module, crops: _Crops, device: torch.device) -> Tensor:
        """(N, F), float32, on `device`."""
        batches = crops.pixels_NCSS.split(self._config.features.batch_size)
        features = [features_of_crops(backbone, batch, device, self._normalisation) for batch in batches]
        return torch.cat(features).float()


def _shuffled(count: int) -> Tensor:
    """0 to count - 1 in an order that only `count` fixes: neighbours in a dataset are often of one class."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _decode(source: Source, indices_N: Tensor, config: FeaturesConfig) -> _Crops:
    """Crops of these samples, decoded by threads: processes would be forked from one that holds a GPU.

    Raises `DataError` where none can be read.
    """
    crops = CentreCrops(source, config)
    indices_N = indices_N.sort().values  # the order in which they are stored
    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        found = list(pool.map(crops.__getitem__, indices_N.tolist()))
    errors = [crop for crop in found if isinstance(crop, DataError)]
    if len(errors) == len(found):
        raise errors[0]
    if errors:
        _log.warning("kNN leaves out %d images that cannot be read. %s", len(errors), errors[0])
    kept = [n for n, crop in enumerate(found) if not isinstance(crop, DataError)]
    pixels_NCSS = torch.stack([found[n] for n in kept])
    return _Crops(pixels_NCSS, torch.from_numpy(source.labels(indices_N[kept].numpy())))
