"""What the GPUs can do by their makers' figures: one table to compare speeds with and to plan by."""

import re
from typing import NamedTuple

_PCIE_3, _PCIE_4, _PCIE_5 = 16e9, 32e9, 64e9  # bytes/s each way, 16 lanes


class Gpu(NamedTuple):
    """NVIDIA's data sheet of one GPU."""

    name: str
    half_flops: float  # dense products in half precision, operations per second
    single_flops: float  # in float32
    memory_bandwidth: float  # bytes per second
    peer_bandwidth: float  # bytes per second, each way, to the other GPUs of a machine
    memory: float  # bytes
    has_bf16: bool = True

    def flops(self, precision: str) -> float | None:
        """Of products in fp32, bf16 or fp16; None for bf16 where it is lacking."""
        if precision == "fp32":
            return self.single_flops
        return None if precision == "bf16" and not self.has_bf16 else self.half_flops


# Cards that NVLink joins in pairs at most count with PCIe, which reaches all. Of several sizes of memory the
# largest; a name such as A100-SXM4-40GB says its own.
GPUS = (
    Gpu("V100 PCIE", 112e12, 14e12, 0.9e12, _PCIE_3, 32e9, has_bf16=False),
    Gpu("V100", 125e12, 15.7e12, 0.9e12, 150e9, 32e9, has_bf16=False),
    Gpu("V100S", 130e12, 16.4e12, 1.13e12, _PCIE_3, 32e9, has_bf16=False),
    Gpu("T4", 65e12, 8.1e12, 0.32e12, _PCIE_3, 16e9, has_bf16=False),
    Gpu("A10", 125e12, 31.2e12, 0.6e12, _PCIE_4, 24e9),
    Gpu("A30", 165e12, 10.3e12, 0.933e12, _PCIE_4, 24e9),
    Gpu("A100 PCIE", 312e12, 19.5e12, 1.935e12, _PCIE_4, 80e9),
    Gpu("A100", 312e12, 19.5e12, 2.039e12, 300e9, 80e9),
    Gpu("L4", 121e12, 30.3e12, 0.3e12, _PCIE_4, 24e9),
    Gpu("L40S", 362e12, 91.6e12, 0.864e12, _PCIE_4, 48e9),
    Gpu("H100 PCIE", 756e12, 51.2e12, 2.0e12, _PCIE_5, 80e9),
    Gpu("H100 NVL", 835e12, 60e12, 3.9e12, _PCIE_5, 94e9),
    Gpu("H100", 989e12, 66.9e12, 3.35e12, 450e9, 80e9),
    Gpu("H20", 148e12, 44e12, 4.0e12, 450e9, 96e9),
    Gpu("H200 NVL", 835e12, 60e12, 4.8e12, _PCIE_5, 141e9),
    Gpu("H200", 989e12, 66.9e12, 4.8e12, 450e9, 141e9),
    Gpu("GH200", 989e12, 66.9e12, 4.0e12, 450e9, 96e9),
    Gpu("B200", 2250e12, 75e12, 8.0e12, 900e9, 180e9),
    Gpu("GB200", 2500e12, 80e12, 8.0e12, 900e9, 186e9),
)
# The GPU of each generation whose figures stand for those that the table does not name.
_BY_CAPABILITY = {(7, 0): "V100", (8, 0): "A100", (9, 0): "H100", (10, 0): "B200"}


def find_gpu(name: str) -> Gpu | None:
    """The first GPU whose words are all in `name`, such as "NVIDIA H100 80GB HBM3" or "a100".

    None for a GPU that is not in the table, and for a part of one.
    """
    words = set(re.split(r"[\s-]+", name.upper()))
    if "MIG" in words:
        return None
    for gpu in GPUS:
        if words >= set(gpu.name.split()):
            sizes = [re.fullmatch(r"(\d+)GB", word) for word in words]
            # A larger one is not the GPU's: "GH200 480GB" counts its processor's.
            stated = [b for size in sizes if size and (b := 1e9 * int(size[1])) <= gpu.memory]
            return gpu._replace(memory=stated[0]) if stated else gpu
    return None


def gpu_like(capability: tuple[int, int]) -> Gpu:
    """What stands for an unknown GPU of that compute capability: the one of its generation, or before it."""
    known = max((c for c in _BY_CAPABILITY if c <= capability), default=min(_BY_CAPABILITY))
    gpu = find_gpu(_BY_CAPABILITY[known])
    assert gpu is not None
    return gpu
