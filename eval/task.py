"""What a protocol works on."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from eval.config import EvalConfig
from eval.features import FeatureShare, Progress, extract_share
from eval.keeper import KEEP_NOTHING, Keeper
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
            lambda done, _: self.progress(before + done, total),
            normalisation=self.normalisation,
            images=images,
            keeper=KEEP_NOTHING if name is None else self.keeper,
            name=name or "",
        )
