"""What "auto" stands for: the algorithm, and the code of the passes around its matrix products."""

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch

from model.collectives import from_first_rank, is_first_rank
from model.loss.hardware import hardware_at_hand
from model.loss.plan import ALGORITHMS_PLANNED, Plan, plan

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
    if name == "triton" and (reason := _why_triton_cannot(device, dtype)):
        _warn_once(f"The loss runs without its Triton kernels: {reason}.")
        name = "torch"
    return importlib.import_module(IMPLEMENTATIONS[name])


def _why_triton_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "they do not compute in float64"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        return _why_triton_does_not_start(device)
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if interpreted else f"Triton does not compile for the device {device.type}"


@cache
def _why_triton_does_not_start(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton does not support the {torch.cuda.get_device_name(device)}"
    import triton

    try:
        triton.runtime.driver.active.get_current_target()  # builds Triton's own helper with the C compiler
    except Exception as error:  # a missing compiler, driver or header: whatever it is, torch can do without
        return f"Triton does not start ({str(error).splitlines()[0]})"
    return None


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)
