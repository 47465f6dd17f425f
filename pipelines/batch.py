"""What a loader yields: uint8 crops of both views and the numbers that the augmentation applies to them.

Shape legend: V views (2), N samples of this rank's batch, S image size in pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol, TypeVar

import torch
from torch import Tensor

NUM_VIEWS = 2
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the codes in `ViewParams.order_VN4`


@dataclass(frozen=True)
class ViewParams:
    """Every random number of the distortions, drawn per sample and view; see `pipelines.draw`.

    A distortion that a sample does not get is stored as its identity (factor 1, shift 0, sigma 0, False).
    """

    box_VN4: Tensor  # int32: crop as top, left, height, width in pixels of the stored image
    flip_VN: Tensor  # bool: mirror left-right
    jitter_VN: Tensor  # bool: whether the four colour operations run at all
    order_VN4: Tensor  # uint8: codes of the colour operations, such as HUE, in their order
    brightness_VN: Tensor  # float32: factor
    contrast_VN: Tensor  # float32: factor
    saturation_VN: Tensor  # float32: factor
    hue_VN: Tensor  # float32: shift in turns of the colour circle, -0.5 to 0.5
    grayscale_VN: Tensor  # bool
    blur_VN: Tensor  # float32: sigma in pixels, 0 for no blur
    solarize_VN: Tensor  # bool

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ViewParams":
        """The same numbers on `device`, as `Tensor.to` copies them."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ViewParams":
        """The same numbers in pinned memory. torch's `DataLoader` calls a method of this name."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "ViewParams":
        return ViewParams(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch, on the training device."""

    views_VNHWC: Tensor  # uint8, channels last: cropped and resized, not yet distorted
    params: ViewParams
    labels_N: Tensor  # int64
    indices_N: Tensor  # int64: positions of the samples in the dataset

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`, as `Tensor.to` copies it."""
        return Batch(*(data.to(device, non_blocking=non_blocking) for data in vars(self).values()))

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory. torch's `DataLoader` calls a method of this name."""
        return Batch(*(data.pin_memory() for data in vars(self).values()))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory from being used again before `stream` has done what is queued on it by then."""
        for tensor in (self.views_VNHWC, self.labels_N, self.indices_N, *vars(self.params).values()):
            tensor.record_stream(stream)


Sent = TypeVar("Sent", Tensor, ViewParams, Batch)


def to_device(data: Sent, device: torch.device) -> Sent:
    """CPU tensors on `device`; to a GPU through pinned memory, so that the host does not wait for it."""
    if device.type != "cuda":
        return data.to(device)
    return data.pin_memory().to(device, non_blocking=True)


class Loader(Protocol):
    """The contract of every loader: the same batches, whatever decodes them."""

    num_samples: int
    steps_per_epoch: int
    bad_samples: Mapping[int, str]  # by index: the reasons why this process could not read them

    def epoch(self, epoch: int | None = None, start_step: int = 0) -> "LoaderEpoch":
        """Iterate over this rank's batches `start_step` .. `steps_per_epoch - 1` of `epoch`.

        Without an epoch: from where the loader stands, to the end of that epoch. An iterator from an earlier
        call ends.
        """

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: the epoch and step of the batch to come, for any number of ranks."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Stand there again. Raises `DataError` where `state` is of another dataset, seed or global batch."""

    def close(self) -> None:
        """Stop threads and processes; the loader cannot be used afterwards."""


class LoaderEpoch(Protocol):
    def __iter__(self) -> "LoaderEpoch": ...

    def __next__(self) -> Batch:
        """Raises `DataError` where a sample cannot be read."""
