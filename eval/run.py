"""From images to figures: extract the features of two datasets, then run a protocol on them."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from eval.config import EvalConfig
from eval.features import Progress, extract_features
from eval.knn import knn_accuracies
from eval.linear import linear_probe
from eval.result import EvalResult, summary
from model.weights import IMAGENET, Normalisation, read_weights
from pipelines.errors import DataError
from pipelines.source import Source

Features = tuple[Tensor, Tensor, Tensor, Tensor]  # features and labels of `train`, then of `test`


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
) -> EvalResult:
    """Run `protocol`, a key of `PROTOCOLS`: learn from the features of `train`, classify those of `test`.

    `model` is a checkpoint, an exported file or a backbone. `normalisation` defaults to the file's own,
    and to ImageNet's for a backbone. `progress` counts the images of both datasets.

    Raises `DataError` where the classes differ, an image cannot be read or there are too few training images;
    `ModelError` where the file cannot be used.
    """
    features = _extract(model, train, test, config, device, progress, normalisation)
    figures = PROTOCOLS[protocol](features, config, device)
    settings = config.model_dump(mode="json", include={"features", protocol})
    return EvalResult(protocol, settings, {"train": summary(train), "test": summary(test)}, figures)


def _knn(features: Features, config: EvalConfig, device: torch.device | str) -> dict[str, float]:
    """Weighted votes of the nearest neighbours."""
    knn = config.knn
    found = knn_accuracies(*features, (knn.k, *knn.also_k), knn.temperature, device, over_ranks=True)
    return {"top1": found[knn.k]} | {f"top1_k{k}": found[k] for k in knn.also_k}


def _linear(features: Features, config: EvalConfig, device: torch.device | str) -> dict[str, float]:
    """A linear classifier."""
    return asdict(linear_probe(*features, config.linear, device))


# By the name of the section of `EvalConfig` that holds the protocol's settings.
PROTOCOLS = {"knn": _knn, "linear": _linear}


def _extract(
    model: Path | nn.Module,
    train: Source,
    test: Source,
    config: EvalConfig,
    device: torch.device | str,
    progress: Progress | None,
    normalisation: Normalisation | None,
) -> Features:
    """Features and labels of `train`, then of `test`."""
    check_labels(train, test)
    if isinstance(model, nn.Module):
        backbone, normalisation = model, normalisation or IMAGENET
    else:
        weights = read_weights(model)
        backbone, normalisation = weights.build(), normalisation or weights.normalisation

    total = len(train) + len(test)
    outputs: list[Tensor] = []
    for source, before in ((train, 0), (test, len(train))):
        report = None if progress is None else _shifted(progress, before, total)
        outputs += extract_features(
            backbone, source, config.features, device, report, normalisation=normalisation
        )
    train_NF, train_labels_N, test_MF, test_labels_M = outputs
    return train_NF, train_labels_N, test_MF, test_labels_M


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


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


def _first_difference(train: Source, test: Source) -> str:
    only = sorted(set(train.classes) ^ set(test.classes))
    return f"only one has {only[0]!r}" if only else "their order"
