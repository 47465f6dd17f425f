"""How much memory a call takes at its peak, on the GPU and on the CPU.

On the CPU it is the resident memory of the process, as the system counts it, so libraries' own buffers count
too. The system's count sees only what the C library gives back: call `return_freed_memory` first, at the
start of a fresh process.
"""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_MMAP_THRESHOLD_BYTES = 65536
_SETTLE_SECONDS = 0.1  # gloo's threads hold the tensors of a collective a little longer than its caller


def return_freed_memory() -> None:
    """Have the C library give every block of 64 KiB or more back to the system as soon as it is freed.

    Otherwise it keeps freed blocks for later, and the system would count them. They stay kept if they were
    freed before this call; allocating gets slower, so do not measure time afterwards. glibc only.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `call` takes at its peak, its result included, beyond what was held before.

    The call runs twice: the first time, libraries set up workspaces that they keep. On the GPU these are the
    bytes of torch's allocator.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        after = torch.cuda.max_memory_allocated(device)
    else:
        time.sleep(_SETTLE_SECONDS)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to the present value
        before = _status_bytes("VmRSS")
        result = call()
        after = _status_bytes("VmHWM")
    del result  # kept until here, because it is part of the peak
    return after - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """On the CPU torch has no error of its own for this."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
