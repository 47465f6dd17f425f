"""What several tests of evaluations need: a network that costs next to nothing, and a keeper in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.config import EvalConfig
from eval.features import Progress
from eval.linear import linear
from eval.result import EvalResult
from eval.run import VOC07, evaluate
from eval.semisup import semisup
from eval.task import EvalTask
from eval.transfer import for_data_set, parts_of, transfer
from model.weights import Normalisation
from pipelines.source import Source, open_source

STATISTICS = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def tiny_backbone() -> nn.Module:
    """16-pixel images to 12 features, with batch-norm statistics that are not those of a new network."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 12, 5, stride=3), nn.BatchNorm2d(12)
    norm.running_mean.normal_(std=0.1)
    norm.running_var.uniform_(0.5, 1.5)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


class Pixels(nn.Module):
    """A backbone whose last map is its image at an eighth of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.avgpool(nn.functional.avg_pool2d(images_NCHW, 8)).flatten(1)


VOC07_CONFIG = EvalConfig.model_validate(
    {
        "features": {"image_size": 32, "resize": 36, "batch_size": 16, "workers": 0},
        "voc07": {"costs": (0.1, 10), "folds": 2},
    }
)


def measure_voc07(devkit: Path, backbone: nn.Module, **options: Any) -> EvalResult:
    """With few costs and small images."""
    parts = map(open_source, parts_of(VOC07, devkit))
    return evaluate(VOC07, backbone, *parts, VOC07_CONFIG, "cpu", **options)


class MemoryKeeper:
    """Always due."""

    is_due = True

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.saved = 0

    def load(self, name: str) -> Any | None:
        return self.kept.get(name)

    def save(self, name: str, value: Any) -> None:
        self.saved += 1
        self.kept[name] = torch.utils._pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value
        )

    def stop_if_asked(self) -> None:
        pass


class StoppedError(Exception):
    """Raised by `stop_after`."""


def stop_after(calls: int) -> Progress:
    """A progress that stops the evaluation at that call."""
    left = calls

    def progress(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise StoppedError

    return progress


def task_of(train: Source, test: Source, settings: dict[str, Any], **fields: Any) -> EvalTask:
    """On the CPU with the tiny network, batches of 8 and crops of 16 pixels."""
    features = {"image_size": 16, "resize": 18, "batch_size": 8, "workers": 0}
    config = EvalConfig.model_validate({"features": features, **settings})
    defaults = {"progress": lambda done, total: None, "backbone": tiny_backbone()}
    given = defaults | fields
    return EvalTask(
        normalisation=STATISTICS, train=train, test=test, config=config, device=torch.device("cpu"), **given
    )


# For 21 and 15 images, shared out unequally, and batches whose parts differ.
RANK_SETTINGS = {
    "linear": {"epochs": 3, "batch_size": 8, "lr": 1.0},
    "linear_fast": {"passes": 2, "epochs": 6, "batch_size": 8, "lr": (0.1, 1.0)},
    "semisup": {"epochs": 3, "batch_size": 7, "lr_backbone": 0.02, "lr_classifier": 0.2},
    "transfer": {"epochs": 3, "batch_size": 8, "lr": 0.1},
}
RANK_SUBSETS = {"semisup": np.array([0, 1, 2, 4, 7, 8, 9, 11, 14, 15, 17, 20])}  # a batch of 7 and one of 5
# The protocols with steps, whose state is kept.
TRAINED = {
    "linear": linear,
    "semisup": semisup,
    "transfer": lambda task: transfer(task, for_data_set("folder", task.config.transfer)),
}
