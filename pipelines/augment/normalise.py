"""What is left to do where the loader `dali` has distorted the views with DALI's own operations."""

import torch
from torch import Tensor

from pipelines.config import AugmentConfig


def normalise(views_VNHWC: Tensor, config: AugmentConfig, dtype: torch.dtype) -> Tensor:
    """(V, N, C, H, W) of `dtype`, each view in channels-last order; the uint8 views may be strided."""
    scale_C, offset_C = (torch.tensor(numbers, device=views_VNHWC.device) for numbers in config.normalisation)
    return (views_VNHWC * scale_C).add_(offset_C).to(dtype).permute(0, 1, 4, 2, 3)
