"""Whether an exported file is the network that it was made from.

Shape legend: N images, H and W pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import ModelError

TOLERANCE = 1e-5  # largest difference of an output, as a share of its largest number
SIZES_NHW = (2, 48, 48), (1, 40, 72)  # of the images to compare on: one image, and sizes that are not square

Network = Callable[[Tensor], tuple[Tensor, ...]]


class Loaded(NamedTuple):
    """A network read back from a file, and by what."""

    network: Network
    reader: str


def largest_difference(network: Network, other: Network) -> float:
    """Of any output on random images, as a share of the largest number in that output of `network`.

    Infinite where the outputs differ in number or shape, or one of them is not finite.
    """
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for count, height, width in SIZES_NHW:
        images = torch.randn(count, 3, height, width, generator=generator)
        with torch.inference_mode():
            expected, found = network(images), other(images)
        if [x.shape for x in expected] != [x.shape for x in found]:
            return float("inf")
        for x, y in zip(expected, found, strict=True):
            if not (x.isfinite().all() and y.isfinite().all()):
                return float("inf")
            scale = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
            largest = max(largest, ((x - y).abs().max() / scale).item())
    return largest


def check_same(network: Network, loaded: Loaded, what: str) -> float:
    """The largest difference. Raises `ModelError`, which begins with `what`, if it is above `TOLERANCE`."""
    difference = largest_difference(network, loaded.network)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{what}: read back with {loaded.reader}, its outputs are not finite, or differ from the "
            f"checkpoint's by {difference:.1e} of their scale, more than {TOLERANCE:g}; nothing is written, "
            f"try another format or checkpoint."
        )
    return difference
