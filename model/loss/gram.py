"""The loss without the D x D matrix, through the N x N Gram matrices of the samples.

sum_ij C_ij^2 = ||A^T B||^2 / N^2 = <A A^T, B B^T> / N^2, and only the diagonal of C is needed beside it.

The redundancy is a difference here, which loses digits where it is far smaller than sum_i C_ii^2. With fewer
samples than features it cannot be (C has at most rank N); with more, the dense algorithm is the cheaper one.

Shape legend: n samples of this rank, N of the global batch, D embedding width.
"""

from types import ModuleType

import torch
from torch import Tensor

from model.collectives import gather_rows, sum_over_ranks_, world_size
from model.loss.first_order import first_derivative_only
from model.loss.normalise import Normalised, gradients, normalise_views
from model.loss.objective import Objective
from model.loss.products import product


class GramLoss(torch.autograd.Function):
    """(total, invariance, redundancy) of the global batch; gradient: that of the global total.

    1. Normalise over the global batch and gather all ranks' rows.
    2. This rank's rows of K_A = A A^T / N and K_B = B B^T / N; divided by N, no element exceeds D.
    3. <K_A, K_B>, summed over ranks, and with it the terms.
    4. Backward, for this rank's rows: N dA = 2 weight K_B A + B diag(g), dB likewise with the views swapped;
       then through 1.
    """

    @staticmethod
    def forward(
        ctx, z_a_nD: Tensor, z_b_nD: Tensor, objective: Objective, ops: ModuleType
    ) -> tuple[Tensor, Tensor, Tensor]:
        N = len(z_a_nD) * world_size()
        normalised = normalise_views(z_a_nD, z_b_nD, N, objective, ops)  # 1
        a_nD, b_nD, _, diagonal_D = normalised
        a_ND, b_ND = gather_rows(a_nD), gather_rows(b_nD)
        k_a_nN, k_b_nN, squares = ops.inner_and_cast(  # 2
            product(a_nD, a_ND.T), product(b_nD, b_ND.T), 1 / N, a_nD.dtype
        )
        *loss, g_D = ops.terms(  # 3
            diagonal_D, sum_over_ranks_(squares), objective.invariance_weight, objective.off_diagonal_weight
        )
        ctx.save_for_backward(*normalised, a_ND, b_ND, k_a_nN, k_b_nN, g_D)
        ctx.engine = N, objective, ops
        ctx.mark_non_differentiable(*loss[1:])
        return tuple(loss)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *normalised, a_ND, b_ND, k_a_nN, k_b_nN, g_D = ctx.saved_tensors
        N, objective, ops = ctx.engine
        p_a_nD, p_b_nD = product(k_b_nN, a_ND), product(k_a_nN, b_ND)  # 4
        alpha = 2 * objective.off_diagonal_weight
        grads = gradients(p_a_nD, p_b_nD, Normalised(*normalised), g_D, alpha, grad_total, N, objective, ops)
        return *grads, None, None
