"""From a backbone and two labelled datasets to figures: any protocol."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from eval.config import EvalConfig
from eval.keeper import KEEP_NOTHING, Keeper
from eval.knn import knn_accuracies
from eval.linear import linear
from eval.linear_fast import linear_fast
from eval.progress import Progress
from eval.result import DataSummary, EvalResult, summary
from eval.semisup import semisup
from eval.task import EvalTask
from eval.transfer import EPOCHS, for_data_set, transfer
from eval.voc07 import check_counts, voc07
from model.weights import IMAGENET, Normalisation, read_weights
from pipelines.errors import DataError
from pipelines.source import Source

VOC07 = "voc07"
RANDOM_CROPS = {"augmentation": "random crops"}  # new ones in each epoch


class Found(NamedTuple):
    """Of a protocol: figures, what to add to its settings, and figures by class where it has such."""

    figures: dict[str, float]
    settings: Mapping[str, Any] = {}
    classes: Mapping[str, dict[str, float]] = {}


def evaluate(
    protocol: str,
    model: Path | nn.Module,
    train: Source,
    test: Source,
    config: EvalConfig,
    device: torch.device | str,
    progress: Progress | None = None,
    *,
    normalisation: Normalisation | None = None,
    keeper: Keeper = KEEP_NOTHING,
    subset_K: np.ndarray | None = None,
) -> EvalResult:
    """Run `protocol`, a key of `PROTOCOLS`: learn from `train`, or its samples `subset_K`; classify `test`.

    Every rank of the process group, if there is one, must call it, and gets the result. `model` is a
    checkpoint, an exported file or a backbone. `normalisation` defaults to the file's own, and to ImageNet's
    for a backbone. `progress` counts images, and starts again for work of another kind. The same evaluation
    goes on from what is in `keeper`.

    Raises `DataError` where the classes differ, an image cannot be read or there are too few training images;
    `ModelError` where the file cannot be used or something diverges.
    """
    if protocol == VOC07:
        check_counts(train, test, config.voc07.folds)
    else:
        check_labels(train, test)
    if isinstance(model, nn.Module):
        backbone, normalisation = model, normalisation or IMAGENET
    else:
        weights = read_weights(model)
        backbone, normalisation = weights.build(), normalisation or weights.normalisation
    task = EvalTask(
        backbone,
        normalisation,
        train,
        test,
        config,
        torch.device(device),
        progress or (lambda done, total: None),
        keeper,
        subset_K,
    )
    found = PROTOCOLS[protocol](task)
    settings = {**settings_of(protocol, config), **found.settings}
    learnt_from = (
        summary(train)
        if subset_K is None
        else DataSummary(str(train.path), len(subset_K), len(train.classes))
    )
    data = {"train": learnt_from, "test": summary(test)}
    return EvalResult(protocol, settings, data, found.figures, dict(found.classes))


def _knn(task: EvalTask) -> Found:
    """Weighted votes of the nearest neighbours."""
    knn, (bank_NF, queries_MF) = task.config.knn, task.features()
    labels_N, labels_M = (torch.from_numpy(source.labels_N.copy()) for source in (task.train, task.test))
    found = knn_accuracies(
        bank_NF,
        labels_N,
        queries_MF,
        labels_M,
        (knn.k, *knn.also_k),
        knn.temperature,
        task.device,
        over_ranks=True,
    )
    return Found({"top1": found[knn.k]} | {f"top1_k{k}": found[k] for k in knn.also_k})


def _linear_fast(task: EvalTask) -> Found:
    """A linear classifier on features that are computed beforehand."""
    result = linear_fast(task)
    tried = {
        "chosen": result.chosen._asdict(),
        "held_out_top1": list(result.held_out_top1.values()),  # by ascending rate, then weight decay
    }
    return Found({"top1": result.top1, "top5": result.top5}, tried)


def _semisup(task: EvalTask) -> Found:
    """Backbone and classifier fine-tuned on few labels."""
    learnt_from = len(task.train) if task.subset_K is None else len(task.subset_K)
    percent = round(100 * learnt_from / len(task.train), 2)
    return Found(semisup(task), {"percent": percent, **RANDOM_CROPS})


def _voc07(task: EvalTask) -> Found:
    """A linear machine for each class."""
    figures, classes = voc07(task)
    return Found(figures, classes=classes)


def _transfer(name: str, task: EvalTask) -> Found:
    """A linear classifier of another data set."""
    config = for_data_set(name, task.config.transfer)
    return Found(transfer(task, config), {"transfer": config.model_dump(mode="json"), **RANDOM_CROPS})


PROTOCOLS: dict[str, Callable[[EvalTask], Found]] = {
    "knn": _knn,
    "linear": lambda task: Found(linear(task), RANDOM_CROPS),
    "linear-fast": _linear_fast,
    "semisup": _semisup,
    **{f"transfer-{name}": partial(_transfer, name) for name in EPOCHS},
    VOC07: _voc07,
}


def settings_of(protocol: str, config: EvalConfig) -> dict[str, Any]:
    """Of this key of `PROTOCOLS`: how images become features, and its own section; for JSON."""
    section = "transfer" if protocol.startswith("transfer-") else protocol.replace("-", "_")
    return config.model_dump(mode="json", include={"features", section})


def check_labels(train: Source, test: Source) -> None:
    """Raise `DataError` unless both are labelled, with the same classes."""
    for source in (train, test):
        if not source.classes:
            raise DataError(
                f"{source.path} has no labels; evaluate on a dataset that was converted with them."
            )
    if train.classes != test.classes:
        raise DataError(
            f"The classes of {train.path} and {test.path} differ ({_first_difference(train, test)}); "
            f"evaluate on two datasets with the same classes."
        )
    for source in (train, test):
        if source.labels_N.min() < 0 or source.labels_N.max() >= len(source.classes):
            raise DataError(
                f"{source.path} has labels from {source.labels_N.min()} to {source.labels_N.max()}, but "
                f"{len(source.classes)} classes; convert the images again."
            )


def _first_difference(train: Source, test: Source) -> str:
    only = sorted(set(train.classes) ^ set(test.classes))
    return f"only one has {only[0]!r}" if only else "their order"
