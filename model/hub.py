"""Torchvision's ResNets with weights of Barlow Twins: what `hubconf.py` offers to `torch.hub`."""

import pickle
from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision.models import ResNet

from model.backbones import give_small_stem
from model.errors import ModelError
from model.tensor_files import TensorFile
from model.weights import BackboneWeights, backbone_weights, differences, read_weights

# By name, what the authors have published (facebookresearch/barlowtwins, hubconf.py).
PUBLISHED = {
    "resnet50": "https://dl.fbaipublicfiles.com/barlowtwins/"
    "ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051/resnet50.pth"
}


def load_resnet(
    name: str, pretrained: bool | str = True, weights: str | Path | None = None, **kwargs: Any
) -> ResNet:
    """Torchvision's network `name`, as the authors' hub gives it, with other weights if wanted.

    `weights` is a file: a run's checkpoint.pt, what `fastbarlow export` writes as .pth or .safetensors, or
    the authors' checkpoint.pth or resnet50.pth. Without it, `pretrained` is the URL of such a .pth file, True
    for the one in `PUBLISHED`, or False for a network as drawn. `kwargs` are for torchvision's function.

    The classifier `fc` is newly drawn; `network.fc = torch.nn.Identity()` leaves the features. Where the
    weights are those of a small stem, so is the network. With weights it has an attribute `normalisation`:
    mean and deviation of the images of 0 to 1 that they expect.

    Raises `ModelError` where the weights cannot be read or do not fit.
    """
    if weights is None and pretrained is False:
        return _torchvision_network(name, kwargs)
    found = read_weights(Path(weights)) if weights is not None else _download(name, pretrained)
    if found.name != name:
        raise ModelError(f"The weights are those of a {found.architecture}; load {found.name}, not {name}.")
    network = _torchvision_network(name, kwargs)
    if found.small_stem:
        give_small_stem(network)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    misfit = differences(found.state, {k: shape for k, shape in shapes.items() if not k.startswith("fc.")})
    if misfit:
        raise ModelError(
            f"The weights do not fit a {name} with other {', '.join(kwargs)}: {misfit}; leave these out."
        )
    network.load_state_dict(found.state, strict=False)
    network.normalisation = found.normalisation
    return network


def _torchvision_network(name: str, kwargs: dict[str, Any]) -> ResNet:
    return getattr(torchvision.models, name)(weights=None, **kwargs)


def _download(name: str, pretrained: bool | str) -> BackboneWeights:
    """Downloaded once; torch keeps it in its hub's folder."""
    url = PUBLISHED.get(name) if pretrained is True else pretrained
    if url is None:
        raise ModelError(
            f"Nobody has published weights of Barlow Twins for {name}; pass weights=FILE, pretrained=URL, or "
            f"pretrained=False for a network as drawn."
        )
    try:
        content = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:  # which those of the network are
        raise ModelError(
            f"Cannot download {url} ({error}); download it by hand and pass weights=FILE."
        ) from error
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"What {url} gave is damaged, or more than tensors and plain data, which could run code; "
            f"download it by hand, look at it and pass weights=FILE."
        ) from error
    return backbone_weights(TensorFile(content, {}), Path(url))
