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

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torchvision.transforms import v2

from eval.average_precision import eleven_point_average_precision, interpolated_average_precision
from eval.config import FeaturesConfig
from eval.crops import PreparedImages
from eval.svm import SvmSettings, fit_classes
from eval.task import EvalTask
from model.collectives import column_range as share_range
from model.collectives import objects_of_all_ranks, world_size
from model.errors import ModelError
from pipelines.errors import DataError
from pipelines.source import Source, Voc07Source
from pipelines.source.voc import DIFFICULT, PRESENT, VOC_CLASSES

NORM_FLOOR = 1e-5  # added to a feature's length before it is divided by it


def voc07(task: EvalTask) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Figures over all classes, and those by class; the sources are of `Voc07Source`, trainval and test.

    `mAP` is the mean over the classes of the interpolated average precision, as VISSL computes it;
    `mAP_11_point` of the measure that VOC itself took in 2007. `progress` counts images, and then classes.
    The machines are fitted on as many processes as decode images, as far as there are cores for them.

    1. features of the squashed images, of length 1
    2. for each class a machine, its cost picked by cross-validation, see `eval.svm`; ranks share the classes
    3. average precisions over the test images that count for the class

    Raises `DataError` where an image cannot be read, `ModelError` where the map is smaller than the grid.
    """
    config, train, test = task.config.voc07, task.train, task.test
    pooled = copy.deepcopy(task.backbone)
    pooled.avgpool = GridPool(config.grid)
    train_NF, test_MF = (  # 1
        _unit(features.double().numpy()) for features in task.features(backbone=pooled, images=SquashedImages)
    )
    settings = SvmSettings(
        config.costs, config.folds, config.positive_weight, config.max_iterations, config.seed
    )
    cores = len(os.sched_getaffinity(0)) // world_size()
    jobs = max(1, min(task.config.features.workers, cores))
    mine = VOC_CLASSES[share_range(len(VOC_CLASSES))]
    by_class = {name: task.keeper.load(f"class-{name}") for name in mine}
    missing = [name for name, kept in by_class.items() if kept is None]
    places = [VOC_CLASSES.index(name) for name in missing]
    fitted = fit_classes(train_NF, train.presence_NC[:, places], test_MF, settings, jobs)
    for done, (name, place, found) in enumerate(zip(missing, places, fitted, strict=True), start=1):  # 2
        counts_M = test.presence_NC[:, place] != DIFFICULT
        ranking = test.presence_NC[counts_M, place] == PRESENT, found.scores_M[counts_M]  # 3
        by_class[name] = {
            "average_precision": interpolated_average_precision(*ranking),
            "eleven_point": eleven_point_average_precision(*ranking),
            "cost": found.cost,
            "held_out_precision": found.held_out_precision,
            "unconverged": found.unconverged,
        }
        task.keeper.save(f"class-{name}", by_class[name])
        done_here = len(mine) - len(missing) + done
        task.progress(done_here * len(VOC_CLASSES) // len(mine), len(VOC_CLASSES))
    classes = {name: found for of_rank in objects_of_all_ranks(by_class) for name, found in of_rank.items()}
    figures = {
        figure: float(np.mean([found[key] for found in classes.values()]))
        for figure, key in (("mAP", "average_precision"), ("mAP_11_point", "eleven_point"))
    }
    return figures, classes


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


class SquashedImages(PreparedImages):
    """uint8 (3, S, S): short side resized, then both sides, whatever the shape."""

    def __init__(self, source: Source, config: FeaturesConfig) -> None:
        super().__init__(source, v2.Resize(config.resize), v2.Resize([config.image_size] * 2))


def _unit(features_NF: np.ndarray) -> np.ndarray:
    return features_NF / (np.linalg.norm(features_NF, axis=1, keepdims=True) + NORM_FLOOR)


def check_counts(train: Source, test: Source, folds: int) -> None:
    """Raise `DataError` unless both are of VOC 2007, with images enough to learn and to test each class."""
    for source, least in ((train, folds), (test, 1)):
        if not isinstance(source, Voc07Source):
            raise DataError(
                f"{source.path} is not PASCAL VOC 2007; name it voc07:VOCDEVKIT:trainval or :test."
            )
        for place, name in enumerate(VOC_CLASSES):
            for value, what in ((PRESENT, "with"), (-PRESENT, "without")):
                count = int((source.presence_NC[:, place] == value).sum())
                if count < least:
                    raise DataError(
                        f"{source.path} has {count} images of this part {what} the class {name}, and {least} "
                        f"are needed; unpack the whole archive."
                    )
