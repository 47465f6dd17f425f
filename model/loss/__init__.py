"""The Barlow Twins loss, exact over ranks, by the cheapest of several equivalent algorithms.

Shape legend: n samples of this rank, N of the global batch, D embedding width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.collectives import EqualRows, world_size
from model.config import LossConfig
from model.errors import ModelError
from model.loss.choose import choose_algorithm, choose_operations
from model.loss.dense import DenseLoss
from model.loss.gram import GramLoss
from model.loss.normalise import on_unit_sphere
from model.loss.objective import Objective
from model.loss.sharded import ShardedLoss

ALGORITHMS = {"dense": DenseLoss, "gram": GramLoss, "sharded": ShardedLoss}

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64

_equal_rows = EqualRows()


class BarlowLoss(NamedTuple):
    """0-d tensors, the same on every rank; only `total` carries a gradient."""

    total: Tensor  # invariance_weight * invariance + off_diagonal_weight * redundancy
    invariance: Tensor  # sum_i (1 - C_ii)^2
    redundancy: Tensor  # sum_{i != j} C_ij^2


def barlow_loss(z_a_nD: Tensor, z_b_nD: Tensor, config: LossConfig) -> BarlowLoss:
    """Loss of the global batch, whose statistics span all ranks (paper, equations 1 and 2).

    Takes this rank's embeddings in one of `DTYPES`. Half-precision embeddings stay so in the operands of
    matrix products; all sums, and the loss, are float32 (float64 for float64). The gradient on each rank is
    exactly d total / d z of its own rows, so a data-parallel *sum* of parameter gradients is the gradient of
    the global loss; a data-parallel *mean* must be multiplied by the world size. It cannot be differentiated
    again. On several ranks the host waits for the accelerator where the number of rows is not that of the
    last call, and for the algorithm of a size that `auto` has not met before; otherwise never.

    Raises `ModelError` for views of different or unfit shapes or dtypes, and for ranks that hold different
    numbers of rows.
    """
    _check(z_a_nD, z_b_nD)
    n, width = z_a_nD.shape
    W, device = world_size(), z_a_nD.device
    _equal_rows.check(n, device)
    N = n * W
    if N < 2:
        raise ModelError("The loss normalises over the batch and needs at least 2 samples in it, not 1.")
    if config.algorithm == "sharded" and width < W:
        raise ModelError(
            f"The sharded loss gives each rank a share of the features, but there are {width} for {W} ranks; "
            "set model.loss.algorithm to gram."
        )
    with torch.autocast(device.type, enabled=False), torch.cuda.device_of(z_a_nD):
        if config.normalise != "batch" or config.temperature is not None:  # ablations, kept simple
            dtype = torch.promote_types(z_a_nD.dtype, torch.float32)
            z_a_nD, z_b_nD = z_a_nD.to(dtype), z_b_nD.to(dtype)
        if config.normalise == "features":
            z_a_nD, z_b_nD = on_unit_sphere(z_a_nD, N), on_unit_sphere(z_b_nD, N)
        algorithm = config.algorithm
        if config.temperature is not None:
            algorithm = "dense"  # the cross-entropy needs every element of C
        elif algorithm == "auto":
            algorithm = choose_algorithm(N, width, W, z_a_nD.dtype, device)
        ops = choose_operations(config.implementation, device, z_a_nD.dtype)
        return BarlowLoss(
            *ALGORITHMS[algorithm].apply(z_a_nD.contiguous(), z_b_nD.contiguous(), Objective.of(config), ops)
        )


def _check(z_a_nD: Tensor, z_b_nD: Tensor) -> None:
    if z_a_nD.shape != z_b_nD.shape or z_a_nD.dim() != 2:
        raise ModelError(
            f"The loss needs two embeddings of one shape (n, D), not {tuple(z_a_nD.shape)} and "
            f"{tuple(z_b_nD.shape)}; pass both views of the same samples."
        )
    if 0 in z_a_nD.shape:
        raise ModelError(
            f"The loss needs samples and features, not embeddings of shape {tuple(z_a_nD.shape)}."
        )
    if z_a_nD.dtype != z_b_nD.dtype or z_a_nD.dtype not in DTYPES or z_a_nD.device != z_b_nD.device:
        raise ModelError(
            "The loss needs two embeddings of one dtype of 16, 32 or 64 bits on one device, not "
            f"{z_a_nD.dtype} on {z_a_nD.device} and {z_b_nD.dtype} on {z_b_nD.device}."
        )
