"""Normalisation of the embeddings over the global batch, forward and backward, without autograd.

Shape legend: n samples of this rank, N of the global batch, D embedding width.
"""

import torch
from torch import Tensor

from model.collectives import sum_over_ranks
from model.loss.reference import EPS


def normalise_over_ranks(z_a_nD: Tensor, z_b_nD: Tensor, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised embeddings of both views, (n, D) each, and 1 / std as (2, D): a, then b.

    Mean and variance take one collective each, because the variance of centred values loses no digits.
    """
    mean_2D = sum_over_ranks(torch.stack([z_a_nD.sum(0), z_b_nD.sum(0)])) / N
    centred_a_nD, centred_b_nD = z_a_nD - mean_2D[0], z_b_nD - mean_2D[1]
    squares_2D = torch.stack([centred_a_nD.square().sum(0), centred_b_nD.square().sum(0)])
    rstd_2D = torch.rsqrt(sum_over_ranks(squares_2D) / N + EPS)
    return centred_a_nD * rstd_2D[0], centred_b_nD * rstd_2D[1], rstd_2D


def normalise_backward(
    grad_a_nD: Tensor, grad_b_nD: Tensor, a_nD: Tensor, b_nD: Tensor, rstd_2D: Tensor, N: int
) -> tuple[Tensor, Tensor]:
    """Gradients for the embeddings, given those for the normalised ones: dZ = rstd (dA - A mean(dA A)).

    Batch-norm's other term, the mean of dA over the batch, is zero here: dA is a combination of samples of
    the other view, whose columns have zero mean.
    """
    q_2D = sum_over_ranks(torch.stack([(grad_a_nD * a_nD).sum(0), (grad_b_nD * b_nD).sum(0)])) / N
    return rstd_2D[0] * (grad_a_nD - a_nD * q_2D[0]), rstd_2D[1] * (grad_b_nD - b_nD * q_2D[1])
