"""What the loss asks of the cross-correlation matrix: the paper's objective and those of its ablations."""

from typing import NamedTuple

from model.config import LossConfig

EPS = 1e-5  # added to the variance, as batch-norm does in the authors' code


class Objective(NamedTuple):
    """total = invariance_weight * invariance + off_diagonal_weight * redundancy."""

    invariance_weight: float
    off_diagonal_weight: float
    standardise: bool  # C is the cross-correlation matrix; else the cross-covariance matrix
    temperature: float | None  # of the cross-entropy; None for the sums of squares

    @classmethod
    def of(cls, config: LossConfig) -> "Objective":
        return cls(
            config.invariance_weight,
            config.off_diagonal_weight,
            config.normalise == "batch",
            config.temperature,
        )
