"""The loss without the D x D matrix, through the N x N Gram matrices of the samples.

sum_ij C_ij^2 = ||A^T B||^2 / N^2 = <A A^T, B B^T> / N^2, and only the diagonal of C is needed beside it.

Shape legend: n samples of this rank, N of the global batch, D embedding width.
"""

import torch
from torch import Tensor

from model.collectives import gather_rows, sum_over_ranks, world_size
from model.loss.normalise import normalise_backward, normalise_over_ranks


class GramLoss(torch.autograd.Function):
    """(total, invariance, redundancy) of the global batch; gradient: that of the global total.

    1. Normalise over the global batch and gather all ranks' rows.
    2. This rank's rows of K_A = A A^T and K_B = B B^T.
    3. Diagonal of C and <K_A, K_B>, in one sum over ranks.
    4. Backward, for this rank's rows: dA = (2 weight / N^2) K_B A + B diag(g) / N with
       g = -2 (1 - C_ii) - 2 weight C_ii, dB likewise with the views swapped; then through 1.
    """

    @staticmethod
    def forward(ctx, z_a_nD: Tensor, z_b_nD: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        N = len(z_a_nD) * world_size()
        a_nD, b_nD, rstd_2D = normalise_over_ranks(z_a_nD, z_b_nD, N)  # 1
        a_ND, b_ND = gather_rows(a_nD), gather_rows(b_nD)
        k_a_nN, k_b_nN = a_nD @ a_ND.T, b_nD @ b_ND.T  # 2
        local = torch.cat([(a_nD * b_nD).sum(0) / N, ((k_a_nN / N) * (k_b_nN / N)).sum().view(1)])  # 3
        diagonal_D, squares = sum_over_ranks(local).split([a_nD.shape[1], 1])
        invariance = (1 - diagonal_D).square().sum()
        redundancy = squares[0] - diagonal_D.square().sum()
        ctx.save_for_backward(a_nD, b_nD, a_ND, b_ND, k_a_nN, k_b_nN, diagonal_D, rstd_2D)
        ctx.weight = weight
        ctx.mark_non_differentiable(invariance, redundancy)
        return invariance + weight * redundancy, invariance, redundancy

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        a_nD, b_nD, a_ND, b_ND, k_a_nN, k_b_nN, diagonal_D, rstd_2D = ctx.saved_tensors
        N = len(a_ND)
        g_D = -2 * (1 - diagonal_D) - 2 * ctx.weight * diagonal_D  # 4
        grad_a_nD = torch.addmm(b_nD * g_D, k_b_nN, a_ND, alpha=2 * ctx.weight / N)
        grad_b_nD = torch.addmm(a_nD * g_D, k_a_nN, b_ND, alpha=2 * ctx.weight / N)
        grad_a_nD, grad_b_nD = normalise_backward(grad_a_nD, grad_b_nD, a_nD, b_nD, rstd_2D, N)
        scale = grad_total / N
        return grad_a_nD * scale, grad_b_nD * scale, None
