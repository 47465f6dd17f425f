"""Which implementation of twin batch-norm serves a device."""

import importlib
from types import ModuleType

import torch

from model.triton_support import triton_serves


def choose_operations(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module with `forward` and `backward` for tensors of `dtype` on `device`.

    That is Triton's on CUDA and torch's elsewhere. Where Triton cannot serve a GPU, the log says so once, and
    torch does the work.
    """
    has_kernels = device.type == "cuda" and triton_serves("Batch-norm", device, dtype)
    return importlib.import_module("model.norm.kernels" if has_kernels else "model.norm.torch_ops")
