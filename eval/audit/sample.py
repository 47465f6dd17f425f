"""The images of an audit: a draw from a dataset, and their features.

Shape legend: N images drawn, K of them that are asked for, F feature width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eval.config import FeaturesConfig
from eval.features import extract_features
from eval.progress import Progress
from model.weights import Normalisation
from pipelines.errors import DataError
from pipelines.source import Source

MIN_IMAGES = 20


class Drawn(Source):
    """Some images of another source, in its order."""

    def __init__(self, source: Source, indices_N: np.ndarray) -> None:
        """`indices_N`: int64 numbers of the samples to take."""
        self.path, self.classes, self.holds_raw = source.path, source.classes, source.holds_raw
        self.whole, self.indices_N = source, indices_N
        self.labels_N = source.labels(indices_N)

    def __len__(self) -> int:
        return len(self.indices_N)

    def sizes(self, indices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.whole.sizes(self.indices_N[indices_K])

    def encoded(self, index: int) -> np.ndarray:
        return self.whole.encoded(int(self.indices_N[index]))

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices_N[index]))

    def pixels(self, index: int) -> np.ndarray | None:
        return self.whole.pixels(int(self.indices_N[index]))


def draw(source: Source, images: int, seed: int) -> Drawn:
    """`images` of the source's images, or all if there are no more; `seed` fixes which.

    Raises `DataError` for fewer than `MIN_IMAGES`.
    """
    if len(source) < MIN_IMAGES:
        raise DataError(
            f"{source.path} holds {len(source)} images; an audit needs at least {MIN_IMAGES} of them."
        )
    random = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(len(source), generator=random)[:images]
    return Drawn(source, order_N.sort().values.numpy())


@dataclass(frozen=True)
class Encoder:
    """A backbone, the statistics its images are normalised with, and how it is shown images."""

    backbone: nn.Module
    normalisation: Normalisation
    features: FeaturesConfig

    def embed(self, source: Source, device: torch.device, progress: Progress | None = None) -> Tensor:
        """Features (N, F), float32, on the CPU; see `extract_features`."""
        features_NF, _ = extract_features(
            self.backbone, source, self.features, device, progress, normalisation=self.normalisation
        )
        return features_NF
