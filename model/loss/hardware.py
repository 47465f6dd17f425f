"""What a rank of this machine can do, for the loss's plan: published peaks, scaled to what products reach."""

import os

import torch

from model.loss.plan import Hardware

REACHED = 0.65  # share of the published peaks that large matrix products and plain passes reach
# By compute capability: half-precision and float32 product flop/s, memory bytes/s, NVLink bytes/s each way
# (NVIDIA's data sheets of the V100, A100, H100 and B200). Other GPUs count as the one before them.
_GPUS = {
    (7, 0): (125e12, 15.7e12, 0.9e12, 150e9),
    (8, 0): (312e12, 19.5e12, 2.0e12, 300e9),
    (9, 0): (989e12, 67e12, 3.35e12, 450e9),
    (10, 0): (2250e12, 80e12, 8.0e12, 900e9),
}
_NETWORK = 12.5e9  # bytes/s for each GPU between machines: 100 Gb/s
_CPU_THREAD = 60e9, 8e9  # float32 product flop/s, memory bytes/s
_LOOPBACK = 2e9  # bytes/s between processes of one machine


def hardware_at_hand(device: torch.device, dtype: torch.dtype, W: int) -> Hardware:
    """The figures of this rank. `W` ranks on more than one machine send at the network's speed."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", W))
    if device.type != "cuda":
        flops, bandwidth = (torch.get_num_threads() * figure for figure in _CPU_THREAD)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 / local_ranks
        return Hardware(flops, bandwidth, _LOOPBACK, memory)
    capability = torch.cuda.get_device_capability(device)
    known = max((c for c in _GPUS if c <= capability), default=min(_GPUS))
    half, single, bandwidth, nvlink = _GPUS[known]
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Hardware(
        REACHED * (half if dtype.itemsize == 2 else single),
        REACHED * bandwidth,
        REACHED * (nvlink if local_ranks == W else _NETWORK),
        free,
    )
