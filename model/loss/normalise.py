"""The two ends that all algorithms of the loss share: normalisation over the batch, forward and backward.

Shape legend: n rows and D columns at hand, N samples of the global batch.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from model.collectives import differentiable_sum_over_ranks, sum_over_ranks, sum_over_ranks_
from model.loss.objective import EPS, Objective


class Normalised(NamedTuple):
    """Both views after normalisation, and what their backward pass needs."""

    a_nD: Tensor  # dtype of the embeddings
    b_nD: Tensor
    rstd_2D: Tensor  # 1 / std of a, then b
    diagonal_D: Tensor  # C_ii


def normalise_views(
    z_a_nD: Tensor, z_b_nD: Tensor, N: int, objective: Objective, ops: ModuleType
) -> Normalised:
    """Normalise both views over the global batch, of which this rank holds all N rows or its share of them.

    1. Moments of the rows at hand, in one read of both views.
    2. Means over the ranks; moments about these means, summed over the ranks.
    3. Views minus mean over standard deviation, and the diagonal of C.
    """
    n = len(z_a_nD)
    moments_5D = ops.column_moments(z_a_nD, z_b_nD)  # 1
    if n < N:  # 2
        mean_2D = sum_over_ranks(moments_5D[:2] * (n / N))
        a_D, b_D = moments_5D[:2] - mean_2D
        moments_5D[:2] = mean_2D
        moments_5D[2].addcmul_(a_D, a_D, value=n)
        moments_5D[3].addcmul_(b_D, b_D, value=n)
        moments_5D[4].addcmul_(a_D, b_D, value=n)
        sum_over_ranks_(moments_5D[2:])
    return Normalised(*ops.normalise(z_a_nD, z_b_nD, moments_5D, N, objective.standardise))  # 3


def gradients(
    p_a_nD: Tensor,
    p_b_nD: Tensor,
    normalised: Normalised,
    g_D: Tensor,
    alpha: float,
    grad_total: Tensor,
    N: int,
    objective: Objective,
    ops: ModuleType,
) -> tuple[Tensor, Tensor]:
    """Gradients for both views' embeddings, where alpha P + B g is N times that for the normalised view a."""
    a_nD, b_nD, rstd_2D, diagonal_D = normalised
    reduced_2D = None
    if objective.standardise:
        reduced_2D = ops.column_reduction(p_a_nD, p_b_nD, a_nD, b_nD)
        if len(a_nD) < N:
            sum_over_ranks_(reduced_2D)
    return ops.embedding_gradients(
        p_a_nD, p_b_nD, a_nD, b_nD, reduced_2D, rstd_2D, diagonal_D, g_D, alpha, grad_total, N
    )


def on_unit_sphere(z_nD: Tensor, N: int) -> Tensor:
    """Each feature standardised over the N samples of all ranks, then each sample scaled to length 1.

    Followed by autograd: it is for an ablation (paper, section 4), and not written for speed.
    """
    centred_nD = z_nD - differentiable_sum_over_ranks(z_nD.sum(0)) / N
    variance_D = differentiable_sum_over_ranks(centred_nD.square().sum(0)) / N
    return torch.nn.functional.normalize(centred_nD * torch.rsqrt(variance_D + EPS))
