"""What "auto" stands for: the algorithm, and the code of the passes around its matrix products."""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

from model.collectives import from_first_rank, is_first_rank
from model.loss.hardware import hardware_at_hand
from model.loss.plan import ALGORITHMS_PLANNED, Plan, plan
from model.triton_support import triton_serves

_log = logging.getLogger(__name__)

IMPLEMENTATIONS = {"torch": "model.loss.torch_ops", "triton": "model.loss.kernels"}


def plan_at_hand(N: int, D: int, W: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan for N samples of all W ranks, D features and this rank's hardware and free memory."""
    return plan(N, D, W, dtype.itemsize, hardware_at_hand(device, dtype, W))


@cache
def choose_algorithm(N: int, D: int, W: int, dtype: torch.dtype, device: torch.device) -> str:
    """The first rank's plan at the first call, for all ranks; logged once."""
    chosen = plan_at_hand(N, D, W, dtype, device)
    if is_first_rank():
        _log.info("Loss for %d samples of width %d, ranks: %d. %s.", N, D, W, chosen.reason.capitalize())
    return ALGORITHMS_PLANNED[from_first_rank(ALGORITHMS_PLANNED.index(chosen.algorithm), device)]


def choose_operations(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module for `implementation` "auto", "torch" or "triton" and for embeddings of `dtype`.

    "auto" is Triton on CUDA and torch elsewhere. Where Triton cannot serve, the log says so once, and torch
    does the work.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch"
    if name == "triton" and not triton_serves("The loss", device, dtype):
        name = "torch"
    return importlib.import_module(IMPLEMENTATIONS[name])
