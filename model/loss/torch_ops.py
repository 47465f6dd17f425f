"""The passes around the loss's matrix products, in plain torch, on any device.

`model/loss/kernels.py` holds the same functions as Triton kernels. Sums are taken in float32 (in float64 for
float64 embeddings), whatever the precision of the operands.

Shape legend: n rows and D columns at hand, N samples of the global batch, M columns of a Gram matrix.
"""

import torch
from torch import Tensor

from model.loss.objective import EPS


def column_moments(z_a_nD: Tensor, z_b_nD: Tensor) -> Tensor:
    """float64 (5, D): the means of a and of b, and the sums of a^2, b^2 and ab about these means.

    Rows are taken from the first one, and the means kept in float64, because a feature whose spread is small
    against its mean would else not end up with a mean of zero, which the backward pass relies on.
    """
    dtype = torch.promote_types(z_a_nD.dtype, torch.float32)
    first_a_D, first_b_D = z_a_nD[0].to(dtype), z_b_nD[0].to(dtype)
    a_nD, b_nD = z_a_nD - first_a_D, z_b_nD - first_b_D
    mean_a_D, mean_b_D = a_nD.mean(0), b_nD.mean(0)
    a_nD -= mean_a_D
    b_nD -= mean_b_D
    sums = a_nD.square().sum(0), b_nD.square().sum(0), (a_nD * b_nD).sum(0)
    means = first_a_D.double() + mean_a_D, first_b_D.double() + mean_b_D
    return torch.stack([*means, *(sum_D.double() for sum_D in sums)])


def normalise(
    z_a_nD: Tensor, z_b_nD: Tensor, moments_5D: Tensor, N: int, standardise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views minus their means and, if `standardise`, over their standard deviations.

    `moments_5D` are those of the N samples. Returns both views in their own dtype, 1 / std as (2, D) (ones
    without `standardise`) and the diagonal of C as (D,), these two in float32 (float64 for float64).
    """
    dtype = torch.promote_types(z_a_nD.dtype, torch.float32)
    mean_2D, squares_2D, products_1D = moments_5D.split([2, 2, 1])
    rstd_2D = torch.rsqrt(squares_2D / N + EPS) if standardise else torch.ones_like(squares_2D)
    diagonal_D = products_1D[0] * rstd_2D[0] * rstd_2D[1] / N
    high_2D = mean_2D.to(dtype)
    offset_2D = ((high_2D - mean_2D) * rstd_2D).to(dtype)  # what the means' rounding would leave
    rstd_2D = rstd_2D.to(dtype)
    a_nD, b_nD = (
        torch.addcmul(offset_D, z_nD - high_D, rstd_D).to(z_nD.dtype)
        for z_nD, high_D, rstd_D, offset_D in zip((z_a_nD, z_b_nD), high_2D, rstd_2D, offset_2D, strict=True)
    )
    return a_nD, b_nD, rstd_2D, diagonal_D.to(dtype)


def inner_and_cast(
    k_a_nM: Tensor, k_b_nM: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`scale` K_A and `scale` K_B in `dtype`, and the sum of the products of their elements (0-d).

    May overwrite its inputs.
    """
    k_a_nM, k_b_nM = k_a_nM.mul_(scale), k_b_nM.mul_(scale)
    return k_a_nM.to(dtype), k_b_nM.to(dtype), (k_a_nM * k_b_nM).sum()


def terms(
    diagonal_D: Tensor, squares: Tensor, invariance_weight: float, off_diagonal_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, invariance, redundancy), 0-d, and g (D,), from the diagonal of C and its sum of squares.

    g is the derivative of the total for C_ii, less the 2 off_diagonal_weight C_ii by which the derivative of
    `squares` exceeds that of the redundancy.
    """
    invariance = (1 - diagonal_D).square().sum()
    redundancy = squares - diagonal_D.square().sum()
    total = invariance_weight * invariance + off_diagonal_weight * redundancy
    g_D = -2 * invariance_weight * (1 - diagonal_D) - 2 * off_diagonal_weight * diagonal_D
    return total, invariance, redundancy, g_D


def column_reduction(p_a_nD: Tensor, p_b_nD: Tensor, a_nD: Tensor, b_nD: Tensor) -> Tensor:
    """(2, D): the sums over the rows of P_A A and of P_B B, element by element."""
    return torch.stack([(p_a_nD * a_nD).sum(0), (p_b_nD * b_nD).sum(0)])


def embedding_gradients(
    p_a_nD: Tensor,
    p_b_nD: Tensor,
    a_nD: Tensor,
    b_nD: Tensor,
    reduced_2D: Tensor | None,
    rstd_2D: Tensor,
    diagonal_D: Tensor,
    g_D: Tensor,
    alpha: float,
    grad_total: Tensor,
    N: int,
) -> tuple[Tensor, Tensor]:
    """Gradients for both views' embeddings, in the dtype of `a_nD`: grad_total / N rstd (dA - A q).

    dA = alpha P_A + B g is N times the gradient for the normalised view, and q = mean(dA A) over the global
    batch follows from `reduced_2D`, the sum of `column_reduction` over all its rows, because mean(B A) is the
    diagonal of C. Where that is None the views were only centred, and q is 0. Batch-norm's other term,
    mean(dA), is 0 always: dA is a combination of samples of views whose columns have zero mean. May overwrite
    P.
    """
    grads = []
    for view, (p_nD, x_nD, other_nD) in enumerate([(p_a_nD, a_nD, b_nD), (p_b_nD, b_nD, a_nD)]):
        grad_nD = p_nD.mul_(alpha).addcmul_(other_nD.to(p_nD.dtype), g_D)
        if reduced_2D is not None:
            q_D = alpha * reduced_2D[view] / N + g_D * diagonal_D
            grad_nD = grad_nD.addcmul_(x_nD.to(p_nD.dtype), q_D, value=-1)
        grads.append(grad_nD.mul_(rstd_2D[view] * (grad_total / N)).to(x_nD.dtype))
    return grads[0], grads[1]
