"""The Barlow Twins loss, exact over ranks, by the cheapest of several equivalent algorithms.

Shape legend: n samples of this rank, D embedding width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.collectives import world_size
from model.config import LossConfig
from model.errors import ModelError
from model.loss.dense import DenseLoss
from model.loss.gram import GramLoss
from model.loss.plan import choose_algorithm

ALGORITHMS = {"dense": DenseLoss, "gram": GramLoss}


class BarlowLoss(NamedTuple):
    """0-d tensors, the same on every rank; only `total` carries a gradient."""

    total: Tensor  # invariance + off_diagonal_weight * redundancy
    invariance: Tensor  # sum_i (1 - C_ii)^2
    redundancy: Tensor  # sum_{i != j} C_ij^2


def barlow_loss(z_a_nD: Tensor, z_b_nD: Tensor, config: LossConfig) -> BarlowLoss:
    """Loss of the global batch, whose statistics span all ranks (paper, equations 1 and 2).

    Takes this rank's embeddings, any floating dtype, the same number of rows on every rank; computes in
    float32 (float64 for float64). The gradient on each rank is exactly d total / d z of its own rows, so a
    data-parallel *sum* of parameter gradients is the gradient of the global loss; a data-parallel *mean*
    must be multiplied by the world size. Raises `ModelError` for views of different or unfit shapes.
    """
    if z_a_nD.shape != z_b_nD.shape or z_a_nD.dim() != 2:
        raise ModelError(
            f"The loss needs two embeddings of one shape (n, D), not {tuple(z_a_nD.shape)} and "
            f"{tuple(z_b_nD.shape)}; pass both views of the same samples."
        )
    n, width = z_a_nD.shape
    if n * world_size() < 2:
        raise ModelError("The loss normalises over the batch and needs at least 2 samples in it, not 1.")
    name = config.algorithm
    if name == "auto":
        name = choose_algorithm(n * world_size(), width)
    dtype = torch.promote_types(z_a_nD.dtype, torch.float32)
    with torch.autocast(z_a_nD.device.type, enabled=False):
        return BarlowLoss(
            *ALGORITHMS[name].apply(z_a_nD.to(dtype), z_b_nD.to(dtype), config.off_diagonal_weight)
        )
