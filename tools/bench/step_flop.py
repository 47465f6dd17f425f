"""What the loss adds to the network's floating-point operations, and the share of the peak they reach."""

import torch

from model.config import ModelConfig
from model.loss.choose import choose_algorithm
from model.loss.plan import Hardware, estimate


def flop_utilisation(flop: float, seconds: float, peak: float | None) -> float | None:
    """Share of the peak (operations per second) that `flop` operations in `seconds` amount to."""
    return None if peak is None else flop / seconds / peak


def loss_flop(algorithm: str, N: int, D: int) -> float:
    """Operations of the loss's products for N samples of width D, forward and backward, on one rank."""
    any_hardware = Hardware(1, 1, 1, 1)  # these are not a matter of speed
    return estimate(algorithm, N, D, 1, torch.float32.itemsize, any_hardware).flop


def our_loss_algorithm(config: ModelConfig, N: int, dtype: torch.dtype, device: torch.device) -> str:
    """The algorithm that `barlow_loss` takes for the embeddings of N pairs in `dtype`."""
    loss = config.loss
    if loss.temperature is not None:
        return "dense"
    if loss.algorithm != "auto":
        return loss.algorithm
    dtype = dtype if loss.normalise == "batch" else torch.promote_types(dtype, torch.float32)
    return choose_algorithm(N, config.projector_widths[-1], 1, dtype, device)
