"""What the device can do at best, measured: the roofs under which kernels are judged."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from tools.bench.timing import synchronise
from train.step import DTYPES

GPU_WIDTH = 8192  # of square matrices; enough work for all multiprocessors
CPU_WIDTHS = 512, 1024, 2048, 4096  # the first whose product takes CPU_SECONDS, or the last
CPU_SECONDS = 0.02
GPU_STREAM_BYTES, CPU_STREAM_BYTES = 2**28, 2**26  # beyond most caches
TRIALS = 5
TRIAL_SECONDS = 0.1  # after which no further trial begins
GPU_CALLS = 4  # of one trial, back to back


def measure_peaks(device: torch.device, precision: str) -> dict[str, Any]:
    """Operations and bytes per second of `device`; the best of a few trials each.

    flops             of products of square matrices in the dtype that the run's products have in `precision`
                      (a key of `DTYPES`); fp32 without TensorFloat-32. Of a multiplication and an addition
                      each counts.
    bytes_per_second  of a copy within the device's memory, what is read and what is written counted. On a CPU
                      what is fetched only to be overwritten is not.

    With the threads that torch has. Takes below a second on one core.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            flops, rate = _product_flops(device, precision), _stream_rate(device)
    else:
        flops, rate = _product_flops(device, precision), _stream_rate(device)
    return {"flops": flops, "bytes_per_second": rate, "precision": precision}


def _product_flops(device: torch.device, precision: str) -> float:
    best = 0.0
    for width in [GPU_WIDTH] if device.type == "cuda" else CPU_WIDTHS:
        a, b = (torch.randn(width, width, device=device).to(DTYPES[precision]) for _ in range(2))
        out = torch.empty_like(a)
        with _no_tf32(precision):
            # A CPU without instructions for a half precision is several times slower in one of the layouts.
            seconds = min(_best_seconds(partial(torch.mm, a, x, out=out), device) for x in (b.t(), b))
        best = max(best, 2 * width**3 / seconds)
        if seconds >= CPU_SECONDS:
            break
    return best


def _stream_rate(device: torch.device) -> float:
    size = GPU_STREAM_BYTES if device.type == "cuda" else CPU_STREAM_BYTES
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    start, best, trials = time.perf_counter(), float("inf"), 0
    if device.type == "cuda":
        call()  # loads the kernel
        synchronise(device)
    while not trials or (trials < TRIALS and time.perf_counter() - start < TRIAL_SECONDS):
        best, trials = min(best, _seconds(call, device)), trials + 1
    return best


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(GPU_CALLS):
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000 / GPU_CALLS


@contextmanager
def _no_tf32(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = allowed and precision != "fp32"
    try:
        yield
    finally:
        matmul.allow_tf32 = allowed
