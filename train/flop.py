"""The floating-point operations of a network, and the peaks of the GPUs that could do them."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.gpus import find_gpu
from model.twin import Twin


def peak_flops(gpu: str, precision: str) -> float | None:
    """Published peak of the GPU of that name in `precision`; None for one unknown, and for a part of one."""
    known = find_gpu(gpu)
    return None if known is None else known.flops(precision)


def model_flop(config: ModelConfig, N: int, S: int) -> int:
    """Operations of the network's convolutions and products for N pairs of S-pixel views, back and forth.

    A multiplication and an addition are two operations. Nothing is computed. N must be at least 2.
    """
    with torch.device("meta"):
        network = Twin(config.model_copy(update={"norm": "torch"}))
        return count_flop(network, torch.empty(2, N, 3, S, S))


def count_flop(network: nn.Module, views_VNCHW: Tensor) -> int:
    """Operations of one forward and backward pass of a network that returns both embeddings."""
    with FlopCounterMode(display=False) as counter:
        z_a_ND, z_b_ND = network(views_VNCHW)
        (z_a_ND.sum() + z_b_ND.sum()).backward()
    return counter.get_total_flops()
