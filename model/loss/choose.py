"""What "auto" stands for: the algorithm, and the code of the passes around its matrix products."""

import importlib
import importlib.util
import os
import warnings
from functools import cache
from types import ModuleType

import torch

from model.collectives import first_ranks
from model.loss.hardware import hardware_at_hand
from model.loss.plan import ALGORITHMS_PLANNED, plan

IMPLEMENTATIONS = {"torch": "model.loss.torch_ops", "triton": "model.loss.kernels"}


@cache
def choose_algorithm(N: int, D: int, W: int, dtype: torch.dtype, device: torch.device) -> str:
    """The plan's choice on the first rank's hardware, and with its free memory at the first call."""
    chosen = plan(N, D, W, dtype.itemsize, hardware_at_hand(device, dtype, W)).algorithm
    return ALGORITHMS_PLANNED[first_ranks(ALGORITHMS_PLANNED.index(chosen), device)]


def choose_operations(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module for `implementation` "auto", "torch" or "triton" and for embeddings of `dtype`.

    "auto" is Triton on CUDA and torch elsewhere. Where Triton cannot serve, a warning says so once, and torch
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
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "Triton does not compile for the CPU"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton does not support the {torch.cuda.get_device_name(device)}"
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
