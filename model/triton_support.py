"""Whether Triton's kernels can serve a device."""

import importlib.util
import logging
import os
from functools import cache

import torch

_log = logging.getLogger(__name__)


def triton_serves(whose: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels for tensors of `dtype` run on `device`; the log says once why `whose` do not."""
    reason = _why_not(device, dtype)
    if reason:
        _warn_once(f"{whose} runs without its Triton kernels: {reason}.")
    return reason is None


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "they do not compute in float64"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        return _why_not_started(device)
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if interpreted else f"Triton does not compile for the device {device.type}"


@cache
def _why_not_started(device: torch.device) -> str | None:
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
