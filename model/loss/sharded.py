"""The loss with the features spread over the ranks: each holds all N samples of its share of the columns.

Statistics over the batch, the diagonal of C and the products with A and B are then local. What crosses the
network is each embedding once on the way in, each gradient once on the way out, and one N x N sum.

Shape legend: n samples of this rank, N of the global batch, D embedding width, d columns of this rank.
"""

from types import ModuleType

import torch
from torch import Tensor

from model.collectives import column_range, columns_to_rows, rows_to_columns, sum_over_ranks_, world_size
from model.loss.first_order import first_derivative_only
from model.loss.normalise import Normalised, gradients, normalise_views
from model.loss.objective import Objective
from model.loss.products import product


class ShardedLoss(torch.autograd.Function):
    """(total, invariance, redundancy) of the global batch; gradient: that of the global total.

    1. All-to-all: from n rows of D columns to N rows of d columns; normalise these.
    2. K_A = A A^T / N, K_B = B B^T / N (divided by N, no element exceeds D) and the diagonal of C, in one
       sum over ranks.
    3. <K_A, K_B>, and with it the terms.
    4. Backward, for this rank's columns: N dA = 2 weight K_B A + B diag(g), dB likewise with the views
       swapped; then through the normalisation.
    5. All-to-all back to rows.
    """

    @staticmethod
    def forward(
        ctx, z_a_nD: Tensor, z_b_nD: Tensor, objective: Objective, ops: ModuleType
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = z_a_nD.shape[1]
        z_a_Nd, z_b_Nd = rows_to_columns(z_a_nD), rows_to_columns(z_b_nD)  # 1
        N = len(z_a_Nd)
        normalised = normalise_views(z_a_Nd, z_b_Nd, N, objective, ops)
        a_Nd, b_Nd, _, diagonal_d = normalised
        k_a_NN, k_b_NN, diagonal_D = _sum_over_ranks(  # 2
            product(a_Nd, a_Nd.T), product(b_Nd, b_Nd.T), diagonal_d, width
        )
        k_a_NN, k_b_NN, squares = ops.inner_and_cast(k_a_NN, k_b_NN, 1 / N, a_Nd.dtype)  # 3
        *loss, g_D = ops.terms(
            diagonal_D, squares, objective.invariance_weight, objective.off_diagonal_weight
        )
        ctx.save_for_backward(*normalised, k_a_NN, k_b_NN, g_D[column_range(width)])
        ctx.engine = width, objective, ops
        ctx.mark_non_differentiable(*loss[1:])
        return tuple(loss)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *normalised, k_a_NN, k_b_NN, g_d = ctx.saved_tensors
        width, objective, ops = ctx.engine
        normalised = Normalised(*normalised)
        a_Nd, b_Nd = normalised.a_nD, normalised.b_nD
        p_a_Nd, p_b_Nd = product(k_b_NN, a_Nd), product(k_a_NN, b_Nd)  # 4
        grads = gradients(
            p_a_Nd,
            p_b_Nd,
            normalised,
            g_d,
            2 * objective.off_diagonal_weight,
            grad_total,
            len(a_Nd),
            objective,
            ops,
        )
        return *(columns_to_rows(grad_Nd, width) for grad_Nd in grads), None, None  # 5


def _sum_over_ranks(
    k_a_NN: Tensor, k_b_NN: Tensor, diagonal_d: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Both Gram matrices summed over the ranks, and the diagonal of C of all ranks' columns as (D,).

    Gram matrices are symmetric: one N x N matrix carries the lower triangle of K_A and, above it, that of
    K_B, whose diagonal goes extra. Overwrites its inputs.
    """
    if world_size() == 1:
        return k_a_NN, k_b_NN, diagonal_d
    N = len(k_a_NN)
    message = k_a_NN.new_zeros(N * N + N + width)
    both_NN, diagonal_b_N, diagonal_D = message.split([N * N, N, width])
    both_NN = both_NN.view(N, N)
    diagonal_b_N.copy_(k_b_NN.diagonal())
    diagonal_D[column_range(width)] = diagonal_d
    torch.add(k_a_NN.tril_(), k_b_NN.triu_(1), out=both_NN)
    sum_over_ranks_(message)
    # Three N x N matrices are all there is: each serves as scratch once its own content has been used.
    torch.tril(both_NN, out=k_a_NN)
    torch.triu(both_NN, 1, out=k_b_NN)
    summed_a_NN = torch.add(k_a_NN, k_a_NN.T, out=both_NN)
    summed_a_NN.diagonal().div_(2)
    summed_b_NN = torch.add(k_b_NN, k_b_NN.T, out=k_a_NN)
    summed_b_NN.diagonal().copy_(diagonal_b_N)
    return summed_a_NN, summed_b_NN, diagonal_D
