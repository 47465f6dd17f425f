"""The loss through the D x D cross-correlation matrix: the cheaper way where the batch is large against D.

Shape legend: n samples of this rank, N of the global batch, D embedding width.
"""

from types import ModuleType

import torch
from torch import Tensor

from model.collectives import sum_over_ranks_, world_size
from model.loss.first_order import first_derivative_only
from model.loss.normalise import Normalised, gradients, normalise_views
from model.loss.objective import Objective
from model.loss.products import product


class DenseLoss(torch.autograd.Function):
    """(total, invariance, redundancy) of the global batch; gradient: that of the global total.

    1. Normalise over the global batch.
    2. C = sum over ranks of A^T B / N.
    3. The terms, and the total's derivative for C: alpha M, and g more on its diagonal.
    4. Backward: N dA = alpha B M^T + B diag(g), N dB = alpha A M + A diag(g), for this rank's rows; then
       through 1.
    """

    @staticmethod
    def forward(
        ctx, z_a_nD: Tensor, z_b_nD: Tensor, objective: Objective, ops: ModuleType
    ) -> tuple[Tensor, Tensor, Tensor]:
        N = len(z_a_nD) * world_size()
        normalised = normalise_views(z_a_nD, z_b_nD, N, objective, ops)  # 1
        a_nD, b_nD, _, diagonal_D = normalised
        c_DD = sum_over_ranks_(product(a_nD.T, b_nD)).div_(N)  # 2
        if objective.temperature is None:  # 3
            *loss, g_D = _squares(c_DD.fill_diagonal_(0), diagonal_D, objective)
            m_DD, alpha = c_DD, 2 * objective.off_diagonal_weight
        else:
            *loss, m_DD = _cross_entropy(c_DD, objective)
            g_D, alpha = torch.zeros_like(diagonal_D), 1.0
        ctx.save_for_backward(*normalised, m_DD.to(a_nD.dtype), g_D)
        ctx.engine = N, alpha, objective, ops
        ctx.mark_non_differentiable(*loss[1:])
        return tuple(loss)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *normalised, m_DD, g_D = ctx.saved_tensors
        N, alpha, objective, ops = ctx.engine
        normalised = Normalised(*normalised)
        p_a_nD, p_b_nD = product(normalised.b_nD, m_DD.T), product(normalised.a_nD, m_DD)  # 4
        return *gradients(p_a_nD, p_b_nD, normalised, g_D, alpha, grad_total, N, objective, ops), None, None


def _squares(
    off_diagonal_DD: Tensor, diagonal_D: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of the paper's loss, and the total's derivative for the diagonal of C."""
    invariance = (1 - diagonal_D).square().sum()
    redundancy = torch.linalg.vector_norm(off_diagonal_DD, dim=1).square().sum()
    total = objective.invariance_weight * invariance + objective.off_diagonal_weight * redundancy
    return total, invariance, redundancy, -2 * objective.invariance_weight * (1 - diagonal_D)


def _cross_entropy(c_DD: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of the cross-entropy with temperature (paper, section 4) and the total's derivative for C.

    invariance = -log sum_i exp(C_ii / t), redundancy = log sum_{i != j} exp(max(C_ij, 0) / t).
    """
    logits_DD = c_DD.clamp(min=0).div_(objective.temperature).fill_diagonal_(-torch.inf)
    logits_D = c_DD.diagonal() / objective.temperature
    invariance, redundancy = -logits_D.logsumexp(0), logits_DD.flatten().logsumexp(0)
    total = objective.invariance_weight * invariance + objective.off_diagonal_weight * redundancy
    shares_DD = logits_DD.sub_(redundancy).exp_().mul_(c_DD > 0)
    m_DD = shares_DD.mul_(objective.off_diagonal_weight / objective.temperature)
    shares_D = (logits_D + invariance).exp()
    m_DD.diagonal().copy_(shares_D.mul_(-objective.invariance_weight / objective.temperature))
    return total, invariance, redundancy, m_DD
