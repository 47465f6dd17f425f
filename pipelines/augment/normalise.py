"""What is left to do where the loader `dali` has distorted the views with DALI's own operations."""

from functools import lru_cache

import torch
from torch import Tensor

from pipelines.config import AugmentConfig


def normalise(views_VNHWC: Tensor, config: AugmentConfig, dtype: torch.dtype) -> Tensor:
    """(V, N, C, H, W) of `dtype`, each view in channels-last order; the uint8 views may be strided."""
    scale_C, offset_C = (_on_device(numbers, views_VNHWC.device) for numbers in config.normalisation)
    return (views_VNHWC * scale_C).add_(offset_C).to(dtype).permute(0, 1, 4, 2, 3)


@lru_cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """float32. Copied once: for each copy to a GPU the host waits, and a CUDA graph cannot record it."""
    return torch.tensor(numbers, device=device)
