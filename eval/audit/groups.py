"""Accuracy by class and by subgroup, with intervals.

Shape legend: N images.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Group:
    """How often the members of a group are classified rightly.

    `low` and `high` are the Wilson interval of 95 %. `stands_out` tells whether the interval that is
    Bonferroni-corrected for the number of groups beside it leaves out the accuracy of all images together.
    """

    name: str
    images: int
    accuracy: float
    low: float
    high: float
    too_small: bool
    stands_out: bool


def wilson(right: int, images: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of `right` in `images`, without continuity correction."""
    from scipy.stats import binomtest

    interval = binomtest(right, images).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_by_group(right_N: np.ndarray, groups: Mapping[str, np.ndarray], min_group: int) -> list[Group]:
    """One `Group` for each entry of `groups`, which maps a name to the numbers of its members.

    `right_N` is bool. Empty groups are left out. Groups of fewer than `min_group` images are said to be too
    small and never stand out.
    """
    members = {name: indices for name, indices in groups.items() if len(indices)}
    overall, corrected = float(right_N.mean()), 1 - (1 - LEVEL) / max(1, len(members))
    found = []
    for name, indices in members.items():
        right, images = int(right_N[indices].sum()), len(indices)
        low, high = wilson(right, images, corrected)
        too_small = images < min_group
        stands_out = not too_small and not low <= overall <= high
        found.append(Group(name, images, right / images, *wilson(right, images), too_small, stands_out))
    return found
