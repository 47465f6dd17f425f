"""Distort a batch of crops with the implementation that suits the device.

`reference.py` defines what every implementation computes. A new one is a module with a `distort` like the one
here, a line in `IMPLEMENTATIONS` and, unless it serves every device, its limits in `why_not`.

Shape legend: V views (2), N samples, C channels (3), H = W image size in pixels.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from pipelines.augment.normalise import normalise
from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig
from pipelines.errors import DataError

_log = logging.getLogger(__name__)

Distort = Callable[[Tensor, ViewParams, AugmentConfig, torch.dtype], Tensor]


def _loader(module: str) -> Callable[[], Distort]:
    return lambda: import_module(f"{__name__}.{module}").distort


# By name, what imports the implementation.
IMPLEMENTATIONS: dict[str, Callable[[], Distort]] = {
    "torch": _loader("torch_ops"),
    "numba": _loader("numba_ops"),
    "triton": _loader("fused"),
}


def distort(views_VNHWC: Tensor, params: ViewParams, config: AugmentConfig, dtype: torch.dtype) -> Tensor:
    """Distort and normalise both views: (V, N, C, H, W) of `dtype`, each view contiguous as channels-last.

    `views_VNHWC` are square uint8 crops; `params` were drawn with `config` and are on the same device.
    `config.implementation` names the implementation. "auto" takes triton on CUDA devices, numba on the CPU
    and torch on the others, and torch where triton cannot run. Raises `DataError` where the one named cannot
    serve the device. With "dali" the loader has distorted the views already. float64 is float32 widened.
    """
    if dtype == torch.float64:
        return distort(views_VNHWC, params, config, torch.float32).double()
    if config.implementation == "dali":
        return normalise(views_VNHWC, config, dtype)
    chosen = choose(config.implementation, views_VNHWC.device)
    return IMPLEMENTATIONS[chosen]()(views_VNHWC, params, config, dtype)


@lru_cache
def choose(implementation: str, device: torch.device) -> str:
    """The entry of `IMPLEMENTATIONS` that serves `device`, as `distort` describes; logged once."""
    if implementation != "auto":
        if reason := why_not(implementation, device):
            raise DataError(
                f"data.augment.implementation {implementation} {reason}, but the views are on {device}; "
                f"choose auto."
            )
        return implementation
    preferred = {"cuda": "triton", "cpu": "numba"}.get(device.type, "torch")
    if reason := why_not(preferred, device):
        _log.warning("The slower torch distorts the views, since %s %s.", preferred, reason)
        return "torch"
    return preferred


def why_not(implementation: str, device: torch.device) -> str | None:
    """What the implementation lacks to serve `device`, or None."""
    if implementation == "numba" and device.type != "cpu":
        return "serves the CPU only"
    if implementation == "triton":
        if device.type != "cuda":
            return "serves CUDA devices only"
        if find_spec("triton") is None:
            return "needs the package triton, which is not installed"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "needs a GPU of compute capability 7.0 or newer"
        try:
            _start_triton()
        except Exception as error:  # a missing compiler, driver or header
            return f"does not start ({str(error).splitlines()[0]})"
    return None


def _start_triton() -> None:
    """Triton builds a helper of its own with the C compiler, which not every machine has."""
    import triton

    triton.runtime.driver.active.get_current_target()
