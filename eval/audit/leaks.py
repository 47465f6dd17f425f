"""Which attributes a linear classifier can read from the features.

Shape legend: N images, F feature width, C categories.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from eval.audit.attributes import Attribute

RESAMPLES = 2_000
LEVEL = 0.95


@dataclass(frozen=True)
class Leak:
    """How well an attribute can be read.

    `balanced_accuracy` is the mean over the categories of the share that is recognised, by probes that have
    not seen the image. `low` and `high` are its interval of 95 % (bootstrap within the categories), `chance`
    is what a constant answer gets, and `shuffled` what the same probes get on shuffled values. `leaks` tells
    whether `low` is above both.
    """

    name: str
    images: int
    categories: list[str]
    balanced_accuracy: float
    low: float
    high: float
    chance: float
    shuffled: float
    leaks: bool
    converged: bool


def read_out(
    features_NF: np.ndarray, attribute: Attribute, *, folds: int, shuffles: int, seed: int
) -> Leak | str:
    """Cross-validated logistic regression on standardised features, or the reason why there can be none.

    1. categories with fewer images than folds are left out, and images whose category is not known
    2. predict each image by a probe that was fitted without its fold
    3. the same on shuffled values, which shows what such probes make of nothing
    """
    counts_C = np.bincount(attribute.values_N[attribute.values_N >= 0], minlength=len(attribute.categories))
    kept = np.flatnonzero(counts_C >= folds)  # 1
    names = [attribute.categories[value] for value in kept]
    if len(kept) < 2:
        return _why_not(attribute, folds)
    is_known_N = np.isin(attribute.values_N, kept)
    inputs_NF, values_N = features_NF[is_known_N], attribute.values_N[is_known_N]

    predicted_N, converged = _predict(inputs_NF, values_N, folds, seed)  # 2
    recall_C = _recall(values_N, predicted_N)
    low, high = _interval(recall_C, counts_C[kept], seed)
    random, shuffled = np.random.default_rng(seed), []  # 3
    for _ in range(shuffles):
        mixed_N = random.permutation(values_N)
        shuffled.append(_recall(mixed_N, _predict(inputs_NF, mixed_N, folds, seed)[0]).mean())
    chance, baseline = 1 / len(kept), float(np.mean(shuffled))
    return Leak(
        name=attribute.name,
        images=len(values_N),
        categories=names,
        balanced_accuracy=float(recall_C.mean()),
        low=low,
        high=high,
        chance=chance,
        shuffled=baseline,
        leaks=low > max(chance, baseline),
        converged=converged,
    )


def _why_not(attribute: Attribute, folds: int) -> str:
    if not (attribute.values_N >= 0).any():
        return "not known of any image"
    if len(attribute.categories) < 2:
        return f"the same for all images ({attribute.categories[0]})"
    return f"fewer than two categories have {folds} images or more"


def _predict(inputs_NF: np.ndarray, values_N: np.ndarray, folds: int, seed: int) -> tuple[np.ndarray, bool]:
    """Out-of-fold predictions (N,), and whether all fits have converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        predicted_N = cross_val_predict(probe, inputs_NF, values_N, cv=split)
    return predicted_N, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _recall(values_N: np.ndarray, predicted_N: np.ndarray) -> np.ndarray:
    """(C,): the share of each category that is recognised; its mean is the balanced accuracy."""
    from sklearn.metrics import recall_score

    return recall_score(values_N, predicted_N, average=None)


def _interval(recall_C: np.ndarray, counts_C: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentiles of the mean recall where each category's images are drawn anew with replacement."""
    draws = np.random.default_rng(seed).binomial(counts_C, recall_C, (RESAMPLES, len(counts_C)))
    low, high = np.quantile((draws / counts_C).mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
