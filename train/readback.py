"""Moments and values of the device that the host learns later, without waiting for them."""

import time

import torch
from torch import Tensor


class Stamp:
    """A moment: on a GPU when all that is queued so far will have been done, on the CPU now."""

    def __init__(self, device: torch.device) -> None:
        self._moment: torch.cuda.Event | float = time.perf_counter()
        if device.type == "cuda":
            self._moment = torch.cuda.Event(enable_timing=True)
            self._moment.record(torch.cuda.current_stream(device))

    def has_come(self) -> bool:
        return not isinstance(self._moment, torch.cuda.Event) or self._moment.query()

    def wait(self) -> None:
        if isinstance(self._moment, torch.cuda.Event):
            self._moment.synchronize()

    def seconds_since(self, earlier: "Stamp") -> float:
        """Time between the two moments, as the device counts it; both must have come."""
        if isinstance(self._moment, torch.cuda.Event):
            return earlier._moment.elapsed_time(self._moment) / 1000
        return self._moment - earlier._moment


class Readback:
    """The values of a 1-d tensor on their way to the host, and the moment at which they were computed.

    On a GPU both are queued behind the work so far: a copy into pinned memory and an event. On the CPU the
    values are there at once.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
        self.stamp = Stamp(values.device)

    def has_arrived(self) -> bool:
        return self.stamp.has_come()

    def read(self) -> list[float]:
        """The values; waits for them where they have not arrived."""
        self.stamp.wait()
        return self._values.tolist()
