"""What a protocol works on.

Shape legend: N training samples, M test samples, K of a subset, F feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from eval.config import EvalConfig, FeaturesConfig
from eval.crops import CentreCrops
from eval.features import FeatureShare, extract_share, gathered
from eval.keeper import KEEP_NOTHING, Keeper
from eval.progress import Progress, shifted
from model.weights import Normalisation
from pipelines.source import Source


@dataclass(frozen=True)
class EvalTask:
    """A backbone, labelled images to learn from and to test on, of the same classes, and the settings.

    `progress` counts images, of all steps of a protocol together.
    """

    backbone: nn.Module
    normalisation: Normalisation  # of the images that the backbone expects
    train: Source
    test: Source
    config: EvalConfig
    device: torch.device
    progress: Progress
    keeper: Keeper = KEEP_NOTHING
    subset_K: np.ndarray | None = None  # int64: which training images to learn from; None: all

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)

    def features(
        self,
        *,
        backbone: nn.Module | None = None,
        images: Callable[[Source, FeaturesConfig], Dataset] = CentreCrops,
    ) -> tuple[Tensor, Tensor]:
        """All ranks' features of the training images (N, F), and of those to test on (M, F), on the CPU.

        `backbone` is the task's own unless another is given.
        """
        total, before, found = len(self.train) + len(self.test), 0, []
        for source, name in ((self.train, "train"), (self.test, "test")):
            prepared = images(source, self.config.features)
            share = self.share(source, name, before, total, images=prepared, backbone=backbone)
            found.append(gathered(share, self.device))
            before += len(source)
        return found[0], found[1]

    def share(
        self,
        source: Source,
        name: str | None,
        before: int,
        total: int,
        *,
        images: Dataset | None = None,
        backbone: nn.Module | None = None,
    ) -> FeatureShare:
        """Features of this rank's share of `source`, kept under `name` if there is one.

        `before` of `total` images are done by then. See `extract_share` for `images`; `backbone` is the
        task's own unless another is given.
        """
        return extract_share(
            backbone or self.backbone,
            source,
            self.config.features,
            self.device,
            shifted(self.progress, before, total),
            normalisation=self.normalisation,
            images=images,
            keeper=KEEP_NOTHING if name is None else self.keeper,
            name=name or "",
        )
