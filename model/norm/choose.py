"""Which implementation of twin batch-norm serves a device."""

import importlib
import importlib.util
import logging
from functools import cache
from types import ModuleType

import torch

_log = logging.getLogger(__name__)


def choose_operations(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module with `forward` and `backward` for tensors of `dtype` on `device`.

    That is Triton's on CUDA and torch's elsewhere. Where Triton cannot serve a GPU, the log says so once, and
    torch does the work.
    """
    has_kernels = device.type == "cuda" and dtype != torch.float64 and _triton_serves(device)
    return importlib.import_module("model.norm.kernels" if has_kernels else "model.norm.torch_ops")


@cache
def _triton_serves(device: torch.device) -> bool:
    reason = _why_triton_cannot(device)
    if reason:
        _log.warning("Batch-norm runs without its Triton kernels: %s.", reason)
    return not reason


def _why_triton_cannot(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton does not support the {torch.cuda.get_device_name(device)}"
    import triton

    try:
        triton.runtime.driver.active.get_current_target()  # builds Triton's own helper with the C compiler
    except Exception as error:  # a missing compiler, driver or header: whatever it is, torch can do without
        return f"Triton does not start ({str(error).splitlines()[0]})"
    return None
