"""The floating-point operations of a network, and the peaks of the GPUs that could do them."""

import re

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.twin import Twin

# Published peaks of dense products in half precision and in float32 (NVIDIA's data sheets), operations per
# second; a GPU is the first whose words are all in its name. Those of the last column lack bfloat16.
_PEAKS = (
    ("V100 PCIE", 112e12, 14e12, "no bf16"),
    ("V100", 125e12, 15.7e12, "no bf16"),
    ("V100S", 130e12, 16.4e12, "no bf16"),
    ("T4", 65e12, 8.1e12, "no bf16"),
    ("A10", 125e12, 31.2e12, ""),
    ("A30", 165e12, 10.3e12, ""),
    ("A100", 312e12, 19.5e12, ""),
    ("L4", 121e12, 30.3e12, ""),
    ("L40S", 362e12, 91.6e12, ""),
    ("H100 PCIE", 756e12, 51.2e12, ""),
    ("H100 NVL", 835e12, 60e12, ""),
    ("H100", 989e12, 66.9e12, ""),
    ("H20", 148e12, 44e12, ""),
    ("H200 NVL", 835e12, 60e12, ""),
    ("H200", 989e12, 66.9e12, ""),
    ("GH200", 989e12, 66.9e12, ""),
    ("B200", 2250e12, 75e12, ""),
    ("GB200", 2500e12, 80e12, ""),
)


def peak_flops(gpu: str, precision: str) -> float | None:
    """Published peak of the GPU of that name in `precision`; None for one unknown, and for a part of one."""
    words = set(re.split(r"[\s-]+", gpu.upper()))
    for name, half, single, lack in _PEAKS:
        if words >= set(name.split()) and "MIG" not in words:
            if precision == "fp32":
                return single
            return None if lack and precision == "bf16" else half
    return None


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
