"""Classification of PASCAL VOC 2007 by linear SVMs on frozen features (paper, section 3.3 and appendix C.1).

The paper follows PIRL (Misra and van der Maaten 2019), which follows Goyal et al. 2019; what these leave open
is taken from the code of these authors, VISSL's (configs/config/benchmark/linear_image_classification/voc07,
vissl/utils/svm_utils): images squashed to a square, the map of the last stage averaged over 6 x 6 windows to
2 x 2, features of length 1, eleven costs, three folds, errors on positives counted twice. Otherwise than
there, images whose only objects of a class are marked as difficult are left out of its training too.

Shape legend: N training images, M test images, F feature width, C = 20 classes, S side in pixels, H and W of
a map.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset
from torchvision.transforms import v2

from eval.average_precision import eleven_point_average_precision, interpolated_average_precision
from eval.config import FeaturesConfig
from eval.features import Progress, extract_features
from eval.result import DataSummary, EvalResult
from eval.svm import SvmSettings, fit_classes
from model.config import Section
from model.errors import ModelError
from model.weights import IMAGENET, Normalisation
from pipelines.errors import DataError
from pipelines.source import Source, Voc07Source, read_image
from pipelines.source.voc import DIFFICULT, PRESENT, VOC_CLASSES

NORM_FLOOR = 1e-5  # added to a feature's length before it is divided by it

Costs = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)]


class Voc07Config(Section):
    """The settings of VISSL's benchmark."""

    grid: Annotated[int, Field(ge=1, le=7)] = Field(
        2, description="Side of the grid to which the last stage's map is averaged; 1 for its mean."
    )
    costs: Costs = (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    folds: Annotated[int, Field(ge=2)] = 3
    positive_weight: Annotated[float, Field(gt=0)] = 2
    max_iterations: Annotated[int, Field(ge=1)] = 2000
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@dataclass(frozen=True)
class ClassFigures:
    """Of one class; shares from 0 to 1."""

    average_precision: float
    eleven_point: float
    cost: float
    held_out_precision: float
    unconverged: int


def voc07(
    backbone: nn.Module,
    devkit: Path,
    features: FeaturesConfig,
    config: Voc07Config,
    device: torch.device | str,
    progress: Progress | None = None,
    *,
    normalisation: Normalisation = IMAGENET,
    jobs: int | None = None,
) -> tuple[EvalResult, dict[str, ClassFigures]]:
    """Train on trainval, test on test; the result, and the figures by class.

    `mAP` is the mean over the classes of the interpolated average precision, as VISSL computes it;
    `mAP_11_point` of the measure that VOC itself took in 2007. `progress` counts images, and then classes.
    The machines are fitted on `jobs` processes, by default on all cores; how many changes nothing.

    1. features of the squashed images, of length 1
    2. for each class a machine, its cost picked by cross-validation; see `eval.svm`
    3. average precisions over the test images that count for the class

    Raises `DataError` for what `Voc07Source` refuses and classes with fewer images than folds; `ModelError`
    where the map is smaller than the grid.
    """
    sources = {"train": Voc07Source(devkit, "trainval"), "test": Voc07Source(devkit, "test")}
    for part, source in sources.items():
        _check_counts(source, config.folds if part == "train" else 1)
    pooled = copy.deepcopy(backbone)
    pooled.avgpool = GridPool(config.grid)
    tell, total = progress or (lambda done, total: None), sum(map(len, sources.values()))
    parts = []
    for source, before in zip(sources.values(), (0, len(sources["train"])), strict=True):  # 1
        features_NF, _ = extract_features(
            pooled,
            source,
            features,
            device,
            lambda done, _, before=before: tell(before + done, total),
            normalisation=normalisation,
            images=SquashedImages(source, features),
        )
        parts.append(_unit(features_NF.double().numpy()))

    train, test = sources.values()
    settings = SvmSettings(
        config.costs, config.folds, config.positive_weight, config.max_iterations, config.seed
    )
    jobs = jobs or len(os.sched_getaffinity(0))
    fitted = fit_classes(parts[0], train.presence_NC, parts[1], settings, jobs, tell)  # 2
    by_class = {}
    for place, (name, found) in enumerate(zip(VOC_CLASSES, fitted, strict=True)):  # 3
        counts_M = test.presence_NC[:, place] != DIFFICULT
        ranking = test.presence_NC[counts_M, place] == PRESENT, found.scores_M[counts_M]
        by_class[name] = ClassFigures(
            interpolated_average_precision(*ranking),
            eleven_point_average_precision(*ranking),
            found.cost,
            found.held_out_precision,
            found.unconverged,
        )
    figures = {
        "mAP": float(np.mean([of.average_precision for of in by_class.values()])),
        "mAP_11_point": float(np.mean([of.eleven_point for of in by_class.values()])),
    }
    data = {
        part: DataSummary(str(source.path), len(source), len(VOC_CLASSES)) for part, source in sources.items()
    }
    used = {"features": features.model_dump(mode="json"), "voc07": config.model_dump(mode="json")}
    return EvalResult("voc07", used, data, figures), by_class


class GridPool(nn.Module):
    """Means over equal, overlapping windows of a map (N, C, H, W), one at each place of a grid."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, map_NCHW: Tensor) -> Tensor:
        """(N, C, grid, grid). Raises `ModelError` where the map is smaller than the grid."""
        H, W = map_NCHW.shape[-2:]
        if min(H, W) < self.grid:
            raise ModelError(
                f"The backbone's last map has {H} x {W} places, fewer than the grid of {self.grid} x "
                f"{self.grid}; take larger images, or --grid {min(H, W)}."
            )
        return avg_pool2d(map_NCHW, (H - self.grid + 1, W - self.grid + 1), stride=1)


class SquashedImages(Dataset):
    """Sample i as uint8 (3, S, S): short side resized, then both sides, whatever the shape; or its error."""

    def __init__(self, source: Source, config: FeaturesConfig) -> None:
        self._source = source
        sides = [config.image_size, config.image_size]
        self._transform = v2.Compose([v2.Resize(config.resize), v2.Resize(sides), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Tensor | DataError:
        try:
            return self._transform(read_image(self._source, index))
        except DataError as error:
            return error


def _unit(features_NF: np.ndarray) -> np.ndarray:
    return features_NF / (np.linalg.norm(features_NF, axis=1, keepdims=True) + NORM_FLOOR)


def _check_counts(source: Voc07Source, least: int) -> None:
    """Raise `DataError` where too few images show a class, or too few do not, to learn or to test it."""
    for place, name in enumerate(VOC_CLASSES):
        for value, what in ((PRESENT, "with"), (-PRESENT, "without")):
            count = int((source.presence_NC[:, place] == value).sum())
            if count < least:
                raise DataError(
                    f"{source.path} has {count} images of this part {what} the class {name}, and {least} are "
                    f"needed; unpack the whole archive."
                )
