"""How far two encoders agree on the same images, and whether one may replace the other without a word.

Shape legend: N images, F and G feature widths, k neighbours, C classes.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import cosine_similarity

from eval.audit.config import SilentConfig


@dataclass(frozen=True)
class ClassDrift:
    """What became of the images of a class: accuracy by neighbours before and after, and what changed."""

    name: str
    images: int
    before: float
    after: float
    changed: float  # share of its images with another prediction
    most_often_to: str  # the new prediction of most of those, or ""


@dataclass(frozen=True)
class Drift:
    """The comparison. `cosine` is None where the widths differ, all about classes where there are no labels.

    `overlap` is the mean share of the k nearest neighbours that are the same, `jaccard` that of the union;
    the chances are those of neighbours drawn at random. `p_value`: McNemar's exact test of whether as many
    images become right as wrong.
    """

    images: int
    cka: float
    cka_biased: float
    cosine: float | None
    k: int
    overlap: float
    overlap_chance: float
    jaccard: float
    jaccard_chance: float
    agreement: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    became_right: int | None
    became_wrong: int | None
    p_value: float | None
    classes: list[ClassDrift]


def linear_cka(x_NF: Tensor, y_NG: Tensor, *, debiased: bool) -> float:
    """Centred kernel alignment with linear kernels (Kornblith et al. 2019, section 3): 1 for features that
    are the same up to rotation, scale and shift.

    `debiased` takes the unbiased estimate of HSIC (Song et al. 2012, equation 5; Nguyen et al. 2021,
    equation 3), which is 0 in the mean for independent features, however wide; it may be below 0 and needs
    four images. No N x N kernel is formed. Features that do not vary give 0.
    """
    hsic = _hsic_unbiased if debiased else _hsic_biased
    x_NF, y_NG = (_prepared(features) for features in (x_NF, y_NG))
    scale = hsic(x_NF, x_NF) * hsic(y_NG, y_NG)
    return hsic(x_NF, y_NG) / scale**0.5 if scale > 0 else 0.0


def neighbour_overlap(first_Nk: Tensor, second_Nk: Tensor) -> tuple[float, float]:
    """Mean share of the neighbours that are the same, and mean Jaccard index."""
    shared_N = (first_Nk[:, :, None] == second_Nk[:, None, :]).sum(dim=(1, 2)).double()
    k = first_Nk.shape[1]
    return (shared_N / k).mean().item(), (shared_N / (2 * k - shared_N)).mean().item()


def overlap_chance(num_images: int, k: int) -> tuple[float, float]:
    """What `neighbour_overlap` gives in the mean for neighbours drawn at random, from the hypergeometric
    distribution of the number that is shared.
    """
    from scipy.stats import hypergeom

    shared = np.arange(k + 1)
    probability = hypergeom.pmf(shared, num_images - 1, k, k)
    return k / (num_images - 1), float((probability * shared / (2 * k - shared)).sum())


def measure_drift(
    features: tuple[Tensor, Tensor],
    neighbours: tuple[Tensor, Tensor],
    predictions: tuple[Tensor, Tensor] | None,
    labels_N: Tensor,
    classes: list[str],
) -> Drift:
    """Compare two encoders by their features (N, F) and (N, G), the numbers of each image's neighbours
    (N, k), and the classes that those predict (N,), where there are labels.
    """
    before, after = features
    k = neighbours[0].shape[1]
    overlap, jaccard = neighbour_overlap(*neighbours)
    chance, jaccard_chance = overlap_chance(len(before), k)
    is_same_width = before.shape == after.shape
    return Drift(
        images=len(before),
        cka=linear_cka(before, after, debiased=True),
        cka_biased=linear_cka(before, after, debiased=False),
        cosine=cosine_similarity(before.double(), after.double()).mean().item() if is_same_width else None,
        k=k,
        overlap=overlap,
        overlap_chance=chance,
        jaccard=jaccard,
        jaccard_chance=jaccard_chance,
        **_of_predictions(predictions, labels_N, classes),
    )


def verdict(drift: Drift, limits: SilentConfig, min_group: int) -> tuple[bool, str]:
    """Whether the replacement may be silent, and one sentence that says why (not)."""
    wanted = [
        ("cosine of an image's two features", drift.cosine, limits.cosine),
        ("CKA", drift.cka, limits.cka),
        ("shared neighbours", drift.overlap, limits.overlap),
        ("predictions that agree", drift.agreement, limits.agreement),
    ]
    faults = [
        f"{name} {value:.3f}, below {limit:g}"
        for name, value, limit in wanted
        if value is not None and value < limit
    ]
    large = [each for each in drift.classes if each.images >= min_group]
    worst = max(large, key=lambda each: each.before - each.after, default=None)
    if worst is not None and worst.before - worst.after > limits.class_drop:
        faults.append(
            f"accuracy of class {worst.name} from {worst.before:.1%} to {worst.after:.1%}, "
            f"a loss of more than {limits.class_drop:.1%}"
        )
    if drift.cosine is None:
        faults.insert(0, "features of another width")
    if not faults:
        return True, "The replacement may be silent: all limits are kept."
    return False, f"The replacement may not be silent: {'; '.join(faults)}."


def _of_predictions(
    predictions: tuple[Tensor, Tensor] | None, labels_N: Tensor, classes: list[str]
) -> dict[str, object]:
    """The fields of `Drift` that are about classes."""
    names = "agreement", "accuracy_before", "accuracy_after", "became_right", "became_wrong", "p_value"
    if predictions is None:
        return {**dict.fromkeys(names), "classes": []}
    from scipy.stats import binomtest

    before_N, after_N = predictions
    was_right_N, is_right_N = before_N == labels_N, after_N == labels_N
    gained, lost = int((~was_right_N & is_right_N).sum()), int((was_right_N & ~is_right_N).sum())
    values = (
        (before_N == after_N).double().mean().item(),
        was_right_N.double().mean().item(),
        is_right_N.double().mean().item(),
        gained,
        lost,
        float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    )
    found = [
        _of_class(label, before_N[labels_N == label], after_N[labels_N == label], classes)
        for label in labels_N.unique().tolist()
    ]
    return {**dict(zip(names, values, strict=True)), "classes": found}


def _of_class(label: int, before_n: Tensor, after_n: Tensor, classes: list[str]) -> ClassDrift:
    """From the predictions for the images of one class."""
    changed_n = before_n != after_n
    to = after_n[changed_n].mode().values.item() if changed_n.any() else None
    return ClassDrift(
        name=classes[label],
        images=len(before_n),
        before=(before_n == label).double().mean().item(),
        after=(after_n == label).double().mean().item(),
        changed=changed_n.double().mean().item(),
        most_often_to="" if to is None else classes[to],
    )


def _prepared(features_NF: Tensor) -> Tensor:
    """float64, centred, and of a size near 1: HSIC is of the fourth power."""
    centred_NF = features_NF.double() - features_NF.double().mean(dim=0)
    return centred_NF / centred_NF.norm(dim=1).mean().clamp(min=1e-300)


def _hsic_biased(x_NF: Tensor, y_NG: Tensor) -> float:
    return float((x_NF.T @ y_NG).square().sum()) / (len(x_NF) - 1) ** 2


def _hsic_unbiased(x_NF: Tensor, y_NG: Tensor) -> float:
    """Of K = X X^T and L = Y Y^T without their diagonals; their sums come from the features themselves."""
    n = len(x_NF)
    k_diagonal_N, l_diagonal_N = x_NF.square().sum(dim=1), y_NG.square().sum(dim=1)
    k_sums_N = x_NF @ x_NF.sum(dim=0) - k_diagonal_N
    l_sums_N = y_NG @ y_NG.sum(dim=0) - l_diagonal_N
    trace = (x_NF.T @ y_NG).square().sum() - k_diagonal_N @ l_diagonal_N
    total = (
        trace + k_sums_N.sum() * l_sums_N.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k_sums_N @ l_sums_N)
    )
    return float(total) / (n * (n - 3))
