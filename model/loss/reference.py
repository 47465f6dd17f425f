"""The definition of the Barlow Twins loss, for one process and for tests (paper, equations 1 and 2).

Shape legend: N samples of the global batch, D embedding width.
"""

from torch import Tensor

EPS = 1e-5  # added to the variance, as batch-norm does in the authors' code


def normalise(z_ND: Tensor) -> Tensor:
    """Each column with zero mean and unit (biased) variance over the batch."""
    centred_ND = z_ND - z_ND.mean(0)
    return centred_ND / (centred_ND.square().mean(0) + EPS).sqrt()


def cross_correlation(z_a_ND: Tensor, z_b_ND: Tensor) -> Tensor:
    """C (D, D): correlation of each feature of view a with each feature of view b over the batch."""
    return normalise(z_a_ND).T @ normalise(z_b_ND) / len(z_a_ND)


def reference_loss(
    z_a_ND: Tensor, z_b_ND: Tensor, off_diagonal_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, invariance, redundancy), 0-d: total = invariance + off_diagonal_weight * redundancy.

    invariance = sum_i (1 - C_ii)^2 and redundancy = sum_{i != j} C_ij^2, in the dtype of the embeddings.
    """
    c_DD = cross_correlation(z_a_ND, z_b_ND)
    invariance = (1 - c_DD.diagonal()).square().sum()
    redundancy = c_DD.square().sum() - c_DD.diagonal().square().sum()
    return invariance + off_diagonal_weight * redundancy, invariance, redundancy
