"""What the network of a recipe has to compute, move and keep, counted on tensors without memory.

Shape legend: M images of both views that pass together, K operators.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from model.config import LossConfig, ModelConfig
from model.twin import Twin

# What PyTorch's host needs to queue one operator: a GPU that is done earlier waits. An assumption.
QUEUE_SECONDS = 10e-6
# Passes of twin batch-norm over tensors of its input's size (model/norm/kernels.py). Forward: x for the
# statistics; x and y. Backward: dy, x and y for the sums; dy, x, y and dx. A residual adds its reading and
# its gradient.
TWIN_FORWARD, TWIN_BACKWARD, TWIN_RESIDUAL = 3, 7, 1
TORCH_FORWARD, TORCH_BACKWARD = 3, 5  # torch's own batch-norm: x; x and y. dy and x; dy, x and dx
_NORM, _NORM_BACKWARD = "native_batch_norm", "native_batch_norm_backward"
_FUSED_BY_TWIN = ("relu_", "threshold_backward")
_LITTLE = ("detach", "empty", "empty_like", "expand", "new_empty_strided", "t", "unbind", "view")  # no data
PROBES = 2, 4  # images: all that is counted is linear in their number


@dataclass(frozen=True)
class Operators:
    """One pass through the network, operator by operator, for any number of images."""

    flop_K: np.ndarray  # an image's
    fixed_bytes_K: np.ndarray  # moved however many images there are: weights
    image_bytes_K: np.ndarray

    def seconds(self, images: float, flops: float, bandwidth: float) -> float:
        """Each operator takes as long as its arithmetic, its traffic or its start, whichever is the longest.

        `flops` operations and `bandwidth` bytes per second are what the device reaches.
        """
        moved_K = self.fixed_bytes_K + images * self.image_bytes_K
        seconds_K = np.maximum(images * self.flop_K / flops, moved_K / bandwidth)
        return float(np.maximum(seconds_K, QUEUE_SECONDS).sum())


@dataclass(frozen=True)
class NetworkWork:
    """Everything about the network that its time, memory and traffic depend on."""

    forward: Operators
    backward: Operators
    saved_bytes: tuple[int, ...]  # an image's, kept for the backward pass, in the order of the forward pass
    cast_bytes: int  # copies of the weights in half precision
    parameter_sizes: tuple[int, ...]  # numbers in each tensor, in the order of the network
    statistics: int  # numbers of the running statistics
    norm_channels: tuple[int, ...]  # of the batch-norms with statistics over all ranks

    @property
    def parameters(self) -> int:
        return sum(self.parameter_sizes)

    @property
    def image_flop(self) -> float:
        return float(self.forward.flop_K.sum() + self.backward.flop_K.sum())

    def activation_bytes(self, images: int) -> int:
        """The most that is held at once for one backward pass, weights and their gradients excluded.

        When the backward pass comes to an operator, all that was kept up to it is there, and with it the
        gradients before and behind it and one more tensor of that size for what they are made with.
        """
        kept = np.cumsum(self.saved_bytes)
        return self.cast_bytes + images * int((kept + 3 * np.array(self.saved_bytes)).max())


def count_network(config: ModelConfig, image_size: int, operand_bytes: int) -> NetworkWork:
    """Count the passes of images of `image_size` pixels in numbers of `operand_bytes`; computes nothing."""
    return _count_once(config.model_copy(update={"loss": LossConfig()}), image_size, operand_bytes)


@cache
def _count_once(config: ModelConfig, image_size: int, operand_bytes: int) -> NetworkWork:
    dtype = {2: torch.bfloat16, 4: torch.float32}[operand_bytes]
    few, many = (_count(config, image_size, dtype, M) for M in PROBES)
    forward, backward = (
        _per_image(few_ops, many_ops) for few_ops, many_ops in zip(few.passes, many.passes, strict=True)
    )
    with torch.device("meta"):
        twin = Twin(config.model_copy(update={"norm": "torch"}))
    parts = {"all": [twin.backbone, twin.projector], "projector": [twin.projector], "none": []}
    norms = [m for part in parts[config.sync_bn] for m in part.modules() if hasattr(m, "running_mean")]
    weights = [p for p in twin.parameters() if p.ndim > 1]
    return NetworkWork(
        forward,
        backward,
        tuple(b // PROBES[0] for b in few.saved),
        operand_bytes * sum(w.numel() for w in weights) if operand_bytes == 2 else 0,
        tuple(p.numel() for p in twin.parameters()),
        sum(b.numel() for b in twin.buffers() if b.is_floating_point()),
        tuple(norm.num_features for norm in norms),
    )


@dataclass(frozen=True)
class _Counted:
    passes: tuple[list[tuple[float, float]], list[tuple[float, float]]]  # (flop, bytes) of each operator
    saved: list[int]


class _Recorder(TorchDispatchMode):
    """Notes floating-point operations and bytes of each operator."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined  # norms that include residual and ReLU
        self.operators: list[tuple[float, float]] = []
        self.is_backward = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        if name in _LITTLE or (self.joined and name in _FUSED_BY_TWIN):
            return result
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
        if not any(t.ndim > 1 for t in tensors):
            return result  # a few numbers, such as the count of batches
        flop = (
            flop_registry[packet](*args, **(kwargs or {}), out_val=result) if packet in flop_registry else 0
        )
        self.operators.append((float(flop), float(self._bytes(name, args, tensors))))
        return result

    def _bytes(self, name: str, args: tuple, tensors: list[Tensor]) -> int:
        largest = max(t.nbytes for t in tensors)
        if name == _NORM:
            return largest * (TWIN_FORWARD if self.joined else TORCH_FORWARD)
        if name == _NORM_BACKWARD:
            return largest * (TWIN_BACKWARD if self.joined else TORCH_BACKWARD)
        if self.joined and name == "add_" and not self.is_backward:  # a residual, inside the norm
            return largest * 2 * TWIN_RESIDUAL
        if name == "convolution_backward":  # of the input and of the weight: dy, w, dx; dy, x, dw
            dy, x, w = args[:3]
            return 2 * (dy.nbytes + x.nbytes + w.nbytes)
        return sum(t.nbytes for t in tensors)


def _count(config: ModelConfig, S: int, dtype: torch.dtype, M: int) -> _Counted:
    """One pass of M images forward and back. Torch's own norms keep the same bytes as the twin's."""
    with torch.device("meta"):
        twin = Twin(config.model_copy(update={"norm": "torch"})).to(dtype)
    network = nn.Sequential(twin.backbone, twin.projector)
    own = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own and tensor.ndim > 1:
            held.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    images_MCSS = torch.empty(M, S, S, 3, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    with _Recorder(joined=config.norm != "torch") as recorder:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            z_MD = network(images_MCSS)
        forward, recorder.operators = recorder.operators, []
        recorder.is_backward = True
        z_MD.backward(torch.empty_like(z_MD))
    return _Counted((forward, recorder.operators), [t.untyped_storage().nbytes() for t in held.values()])


def _per_image(few: list[tuple[float, float]], many: list[tuple[float, float]]) -> Operators:
    few_K2, many_K2 = np.array(few), np.array(many)
    slope_K2 = (many_K2 - few_K2) / (PROBES[1] - PROBES[0])
    fixed_K2 = few_K2 - PROBES[0] * slope_K2
    return Operators(slope_K2[:, 0], fixed_K2[:, 1], slope_K2[:, 1])
