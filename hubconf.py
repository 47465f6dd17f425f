"""Trained backbones for `torch.hub`, from a clone of this repository.

    torch.hub.load("path/of/clone", "resnet50", source="local", weights="runs/a/checkpoint.pt")
    torch.hub.load("path/of/clone", "resnet50", source="local")  # the authors' published weights

See `model.hub.load_resnet` for the arguments and for what comes back.
"""

from typing import Any as _Any

try:
    from model.hub import load_resnet as _load_resnet
except ImportError as _error:
    raise ImportError(
        f"Cannot import the package 'model' beside {__file__} ({_error}); if this process has "
        f"already imported another module of that name, load the weights before that."
    ) from _error

dependencies = ["numpy", "safetensors", "torch", "torchvision"]


def resnet18(*args: _Any, **kwargs: _Any) -> _Any:
    """ResNet-18; `weights=FILE` or `pretrained=URL`: nobody has published weights."""
    return _load_resnet("resnet18", *args, **kwargs)


def resnet34(*args: _Any, **kwargs: _Any) -> _Any:
    """ResNet-34; `weights=FILE` or `pretrained=URL`: nobody has published weights."""
    return _load_resnet("resnet34", *args, **kwargs)


def resnet50(*args: _Any, **kwargs: _Any) -> _Any:
    """ResNet-50; `weights=FILE`, `pretrained=URL`, or by default the authors' published weights."""
    return _load_resnet("resnet50", *args, **kwargs)


def resnet101(*args: _Any, **kwargs: _Any) -> _Any:
    """ResNet-101; `weights=FILE` or `pretrained=URL`: nobody has published weights."""
    return _load_resnet("resnet101", *args, **kwargs)


def resnet152(*args: _Any, **kwargs: _Any) -> _Any:
    """ResNet-152; `weights=FILE` or `pretrained=URL`: nobody has published weights."""
    return _load_resnet("resnet152", *args, **kwargs)
