"""The loss through the D x D cross-correlation matrix: the cheaper way where the batch is large against D.

Shape legend: n samples of this rank, N of the global batch, D embedding width.
"""

import torch
from torch import Tensor

from model.collectives import sum_over_ranks, world_size
from model.loss.normalise import normalise_backward, normalise_over_ranks


class DenseLoss(torch.autograd.Function):
    """(total, invariance, redundancy) of the global batch; gradient: that of the global total.

    1. Normalise over the global batch.
    2. C = sum over ranks of A^T B / N.
    3. Backward: dL/dC = G, dA = B G^T / N and dB = A G / N for this rank's rows, then through 1.
    """

    @staticmethod
    def forward(ctx, z_a_nD: Tensor, z_b_nD: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        N = len(z_a_nD) * world_size()
        a_nD, b_nD, rstd_2D = normalise_over_ranks(z_a_nD, z_b_nD, N)  # 1
        c_DD = sum_over_ranks(a_nD.T @ b_nD) / N  # 2
        diagonal_D = c_DD.diagonal()
        invariance = (1 - diagonal_D).square().sum()
        redundancy = c_DD.square().sum() - diagonal_D.square().sum()
        ctx.save_for_backward(a_nD, b_nD, rstd_2D, c_DD)
        ctx.weight = weight
        ctx.mark_non_differentiable(invariance, redundancy)
        return invariance + weight * redundancy, invariance, redundancy

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        a_nD, b_nD, rstd_2D, c_DD = ctx.saved_tensors
        N = len(a_nD) * world_size()
        g_DD = 2 * ctx.weight * c_DD  # 3
        g_DD.diagonal().copy_(-2 * (1 - c_DD.diagonal()))
        grad_a_nD, grad_b_nD = b_nD @ g_DD.T, a_nD @ g_DD
        grad_a_nD, grad_b_nD = normalise_backward(grad_a_nD, grad_b_nD, a_nD, b_nD, rstd_2D, N)
        scale = grad_total / N
        return grad_a_nD * scale, grad_b_nD * scale, None
