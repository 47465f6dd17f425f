"""Linear support vector machines, each with a cost picked by cross-validation; torch is not needed.

Shape legend: N samples, n of them that count for a class, M test samples, F feature width, C classes.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SvmSettings:
    """LIBLINEAR's, through scikit-learn's `LinearSVC`: L2 penalty, squared hinge, dual."""

    costs: Sequence[float]
    folds: int
    positive_weight: float  # of the positive class's errors, to 1 of the negative one's
    max_iterations: int
    seed: int


@dataclass(frozen=True)
class FittedClass:
    """What one class's machine says of the test samples, and how it was found."""

    scores_M: np.ndarray
    cost: float
    held_out_precision: float  # mean average precision over the folds, at this cost
    unconverged: int  # fits, of all, that stopped at the limit of iterations


def fit_classes(
    train_NF: np.ndarray,
    presence_NC: np.ndarray,
    test_MF: np.ndarray,
    settings: SvmSettings,
    jobs: int,
) -> Iterator[FittedClass]:
    """One machine against the rest for each class, in their order, on `jobs` processes.

    `presence_NC`: 1 for a class that is present, -1 for one that is not; 0 leaves the sample out for it.
    """
    from joblib import Parallel, delayed

    num_classes = presence_NC.shape[1]
    work = (
        delayed(fit_class)(train_NF, np.ascontiguousarray(presence_NC[:, c]), test_MF, settings)
        for c in range(num_classes)
    )
    return Parallel(n_jobs=max(1, min(jobs, num_classes)), return_as="generator")(work)


def fit_class(
    train_NF: np.ndarray, presence_N: np.ndarray, test_MF: np.ndarray, settings: SvmSettings
) -> FittedClass:
    """1. average precision of each cost on `folds` held-out parts of the training samples
    2. the best cost, of equal ones the first, fitted to all of them
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    counts_N = presence_N != 0
    features_nF, labels_n = train_NF[counts_N], presence_N[counts_N]
    means = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        for cost in settings.costs:  # 1
            machine = LinearSVC(
                C=cost,
                class_weight={1: settings.positive_weight, -1: 1},
                dual=True,
                max_iter=settings.max_iterations,
                random_state=settings.seed,
            )
            scores = cross_val_score(
                machine, features_nF, labels_n, cv=settings.folds, scoring="average_precision"
            )
            means.append(float(scores.mean()))
        best = int(np.argmax(means))
        machine.set_params(C=settings.costs[best]).fit(features_nF, labels_n)  # 2
    unconverged = sum(issubclass(entry.category, ConvergenceWarning) for entry in caught)
    return FittedClass(machine.decision_function(test_MF), settings.costs[best], means[best], unconverged)
