"""What a rank of this machine can do, for the loss's plan: published peaks, scaled to what products reach."""

import os

import torch

from model.gpus import Gpu, find_gpu, gpu_like
from model.loss.plan import Hardware

REACHED = 0.65  # share of the published peaks that large matrix products and plain passes reach
NETWORK = 12.5e9  # bytes/s for each GPU between machines: 100 Gb/s
CPU_THREAD = 60e9, 8e9  # float32 product flop/s, memory bytes/s
LOOPBACK = 2e9  # bytes/s between processes of one machine


def hardware_at_hand(device: torch.device, dtype: torch.dtype, W: int) -> Hardware:
    """The figures of this rank. `W` ranks on more than one machine send at the network's speed."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", W))
    if device.type != "cuda":
        flops, bandwidth = (torch.get_num_threads() * figure for figure in CPU_THREAD)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 / local_ranks
        return Hardware(flops, bandwidth, LOOPBACK, memory)
    gpu = find_gpu(torch.cuda.get_device_name(device)) or gpu_like(torch.cuda.get_device_capability(device))
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return gpu_hardware(gpu, dtype.itemsize, gpu.peer_bandwidth if local_ranks == W else NETWORK, free)


def gpu_hardware(gpu: Gpu, operand_bytes: int, link_bandwidth: float, memory: float) -> Hardware:
    """What a rank on that GPU reaches, with operands of that size and a link of that published speed."""
    flops = gpu.half_flops if operand_bytes == 2 else gpu.single_flops
    return Hardware(REACHED * flops, REACHED * gpu.memory_bandwidth, REACHED * link_bandwidth, memory)
