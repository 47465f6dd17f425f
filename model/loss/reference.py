"""The definition of the loss, for one process and for tests (paper, equations 1 and 2 and section 4).

Shape legend: N samples of the global batch, D embedding width.
"""

import torch
from torch import Tensor

from model.config import LossConfig
from model.loss.objective import EPS


def standardise(z_ND: Tensor) -> Tensor:
    """Each column with zero mean and unit (biased) variance over the batch."""
    centred_ND = z_ND - z_ND.mean(0)
    return centred_ND / (centred_ND.square().mean(0) + EPS).sqrt()


def cross_correlation(z_a_ND: Tensor, z_b_ND: Tensor, normalisation: str = "batch") -> Tensor:
    """C (D, D): how each feature of view a goes with each feature of view b over the batch.

    Their correlation for "batch". Their covariance otherwise: after "features", which puts each sample of
    the normalised embeddings on the unit sphere, or of the embeddings as they are ("none").
    """
    if normalisation == "batch":
        return standardise(z_a_ND).T @ standardise(z_b_ND) / len(z_a_ND)
    if normalisation == "features":
        z_a_ND, z_b_ND = (torch.nn.functional.normalize(standardise(z_ND)) for z_ND in (z_a_ND, z_b_ND))
    return (z_a_ND - z_a_ND.mean(0)).T @ (z_b_ND - z_b_ND.mean(0)) / len(z_a_ND)


def reference_loss(z_a_ND: Tensor, z_b_ND: Tensor, config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(total, invariance, redundancy), 0-d, in the dtype of the embeddings.

    total = invariance_weight * invariance + off_diagonal_weight * redundancy. The terms are
    sum_i (1 - C_ii)^2 and sum_{i != j} C_ij^2, or with a temperature t
    -log sum_i exp(C_ii / t) and log sum_{i != j} exp(max(C_ij, 0) / t).
    """
    c_DD = cross_correlation(z_a_ND, z_b_ND, config.normalise)
    diagonal_D, off_diagonal = (
        c_DD.diagonal(),
        c_DD[~torch.eye(len(c_DD), dtype=torch.bool, device=c_DD.device)],
    )
    if config.temperature is None:
        invariance = (1 - diagonal_D).square().sum()
        redundancy = off_diagonal.square().sum()
    else:
        invariance = -(diagonal_D / config.temperature).logsumexp(0)
        redundancy = (off_diagonal.clamp(min=0) / config.temperature).logsumexp(0)
    total = config.invariance_weight * invariance + config.off_diagonal_weight * redundancy
    return total, invariance, redundancy
