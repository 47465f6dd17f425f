"""The distortions of a whole batch on the CPU: compiled by numba, on all of torch's threads.

The same result as `torch_ops`, several times as fast: every sample goes through all operations while it is in
the cache of one core, and pays only for the operations that it drew.

Threads are plain Python threads that run compiled code without the GIL. numba's own ones would end the
process where two threads start them at a time, or where a process is forked after their first use, and both
happen beside data loaders.

The first call of a process compiles, which takes seconds; the result is kept on disk (numba's cache).

Shape legend: V views (2), N samples, H = W image size in pixels, C channels (3), K 16-bit words of an output
image.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.box_blur import box_weights
from pipelines.augment.numba_kernels import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LEAVE_HUE,
    SAMPLE,
    distort_samples,
)
from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig

ENCODINGS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
PIXELS_AT_ONCE = 2**19  # handed to a thread together: about 2 ms of work
RANGES_PER_THREAD = 4  # at least


def distort(views_VNHWC: Tensor, params: ViewParams, config: AugmentConfig, dtype: torch.dtype) -> Tensor:
    """Distort and normalise both views: (V, N, C, H, W) of `dtype`, each view contiguous as channels-last.

    `views_VNHWC` are square uint8 crops on the CPU, as are `params`, which were drawn with `config`; `dtype`
    is float32, bfloat16 or float16. The result depends neither on the number of threads nor on the
    other samples.
    """
    num_views, num_samples, size = views_VNHWC.shape[:3]
    if num_samples == 0:
        return torch.empty(views_VNHWC.shape, dtype=dtype).permute(0, 1, 4, 2, 3)
    # numpy asks the kernel for huge pages, torch does not; its own small ones take as long as half the work.
    out_VNK = np.empty((num_views, num_samples, 3 * size**2 * dtype.itemsize // 2), np.uint16)
    samples_VN = _samples(params)
    work = partial(
        distort_samples,
        views_VNHWC.contiguous().view(num_views, num_samples, -1).numpy(),
        samples_VN,
        samples_VN["radius"].max(),
        *np.array(config.normalisation, np.float32),
        out_VNK,
        ENCODINGS[dtype],
    )
    _run_in_threads(work, num_views * num_samples, math.ceil(PIXELS_AT_ONCE / size**2))
    out_VNHWC = torch.from_numpy(out_VNK).view(dtype).view(views_VNHWC.shape)
    return out_VNHWC.permute(0, 1, 4, 2, 3)


def _samples(params: ViewParams) -> np.ndarray:
    """The numbers of each sample, (V, N) of `SAMPLE`."""
    samples_VN = np.zeros(params.flip_VN.shape, SAMPLE)
    for name in ("flip", "jitter", "grayscale", "solarize", "brightness", "contrast", "saturation"):
        samples_VN[name] = getattr(params, f"{name}_VN").numpy()
    samples_VN["order"] = params.order_VN4.numpy()
    hue_VN = params.hue_VN.numpy()
    steps_VN = np.trunc(255 * hue_VN.astype(np.float64)) % 256
    samples_VN["hue"] = np.where(hue_VN == 0, LEAVE_HUE, steps_VN)
    samples_VN["blur"] = params.blur_VN.numpy() > 0
    for name, numbers in box_weights(params.blur_VN)._asdict().items():
        samples_VN[name] = numbers.numpy()
    return samples_VN


def _run_in_threads(work: Callable[[int, int], None], total: int, at_once: int) -> None:
    """`work(start, stop)` for ranges that cover `total`, on as many threads as torch has.

    A range is `at_once` long, or less where the last ones would keep some threads waiting for others.
    """
    threads = min(torch.get_num_threads(), total)
    if threads == 1:
        work(0, total)
        return
    step = min(at_once, math.ceil(total / (RANGES_PER_THREAD * threads)))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda start: work(start, min(start + step, total)), range(0, total, step)):
            pass  # but raise what a thread raised
