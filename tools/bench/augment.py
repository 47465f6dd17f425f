"""`fastbarlow bench augment`: every implementation of the distortions against the authors', side by side.

Shape legend: V views (2), N samples, C channels (3), H = W = S image size in pixels.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import count, cycle, islice
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import IMPLEMENTATIONS, why_not
from pipelines.batch import NUM_VIEWS, ViewParams
from pipelines.config import AugmentConfig, DataConfig
from pipelines.draw import draw_views
from pipelines.loaders import build_loader
from tools.bench.augment_peers import AuthorsWorkers, kornia, torchvision_v2
from tools.bench.timing import synchronise
from tools.environment import describe_environment
from train.step import DTYPES

CPU = torch.device("cpu")
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16")}
TURN_S, MAX_PASSES = 0.3, 20  # a turn is as many passes over the batch as fill this time, within bounds
QUEUE_AHEAD_CYCLES = 100_000_000  # about 50 ms of a GPU, in which the host queues what is to be timed
EPOCHS_AHEAD = 4  # of random numbers, on a GPU
COPIED_BYTES = 256 << 20  # more than any cache holds
IMAGE_SIDE = 224  # of the stored images that boxes are drawn for; nobody uses the boxes


class Variant(NamedTuple):
    """One way to distort the batch."""

    implementation: str
    dtype: str
    device: torch.device
    run: Callable[[], Any]  # one pass over the batch; returns its images or their sums, (nested) tensors


def bench_augment(
    device: torch.device,
    *,
    size: int,
    batch: int,
    repeats: int,
    images: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Pairs/s of each way from uint8 crops of `size` pixels to normalised views, with default distortions.

    The variants take turns, so that a slow moment of the machine hits all of them. Ours run on as many
    threads as torch, the authors' PIL code in as many processes. On the CPU the time includes drawing the
    random numbers. On a GPU ours are drawn ahead, as the loaders do it, and what counts is the GPU's time
    from the first kernel to the last; each row's "timed" tells which.

    The crops are those of `images`, a folder with one sub-folder per class, or drawn. Raises `DataError`
    where `images` cannot be read or holds fewer than `batch`.
    """
    config = AugmentConfig()
    views_VNHWC = _photographs(images, batch, size) if images else draw_photographs(batch, size)
    load_average = os.getloadavg()[0]
    unavailable = {name: reason for name in IMPLEMENTATIONS if (reason := why_not(name, device))}
    with ExitStack() as stack:
        workers = stack.enter_context(AuthorsWorkers(views_VNHWC, config, torch.get_num_threads()))
        variants = [Variant("authors", "fp32", CPU, workers.run)]
        variants += _ours(views_VNHWC, config, device, unavailable)
        if device.type == "cuda":
            views_VNCHW = views_VNHWC.to(device).permute(0, 1, 4, 2, 3).contiguous()
            variants.append(
                Variant("torchvision v2 per sample", "fp32", device, torchvision_v2(views_VNCHW, config))
            )
            batched = kornia(views_VNCHW, config)
            if batched is None:
                unavailable["Kornia"] = "is not installed"
            else:
                variants.append(Variant("Kornia", "fp32", device, batched))
        seconds = _take_turns(variants, repeats, progress)
    return {
        "bench": "augment",
        "date": datetime.now(UTC).date().isoformat(),
        "images": str(images) if images else "drawn",
        "batch": batch,
        "rows": _rows(variants, seconds, size, batch, config),
        "unavailable": unavailable,
        "load_average": load_average,
        "environment": describe_environment(device),
    }


def draw_photographs(batch: int, size: int) -> Tensor:
    """uint8 (V, N, S, S, C): soft shapes of all colours with fine noise, as pixels of photographs vary."""
    generator = torch.Generator().manual_seed(0)
    coarse_MC77 = 255 * torch.rand(NUM_VIEWS * batch, 3, 7, 7, generator=generator)
    soft_MCHW = torch.nn.functional.interpolate(coarse_MC77, size=(size, size), mode="bicubic")
    soft_MCHW += 8 * torch.randn(soft_MCHW.shape, generator=generator)
    pixels_MHWC = soft_MCHW.clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return pixels_MHWC.view(NUM_VIEWS, batch, size, size, 3)


def _photographs(images: Path, batch: int, size: int) -> Tensor:
    """uint8 (V, N, S, S, C): both crops of the first batch of the folder's images."""
    data = DataConfig(path=images, loader="folder", image_size=size, workers=0)
    loader = build_loader(data, seed=0, batch_size=batch)
    try:
        return next(loader.epoch(0)).views_VNHWC
    finally:
        loader.close()


def _ours(
    views_VNHWC: Tensor, config: AugmentConfig, device: torch.device, unavailable: dict[str, str]
) -> Iterator[Variant]:
    """Every implementation that serves the device, in single and half precision."""
    batch = views_VNHWC.shape[1]
    indices_N, sides_N = np.arange(batch), np.full(batch, IMAGE_SIDE)

    def draw(epoch: int) -> ViewParams:
        return draw_views(config.views, 0, epoch, indices_N, sides_N, sides_N).to(device)

    views_VNHWC = views_VNHWC.to(device)
    for name, load in IMPLEMENTATIONS.items():
        if name in unavailable:
            continue
        distort = load()
        for dtype in PRECISIONS[device.type]:
            numbers = map(draw, count())
            if device.type == "cuda":
                numbers = cycle(list(islice(numbers, EPOCHS_AHEAD)))
            yield Variant(
                name,
                dtype,
                device,
                lambda distort=distort, numbers=numbers, dtype=DTYPES[dtype]: distort(
                    views_VNHWC, next(numbers), config, dtype
                ),
            )


def _take_turns(
    variants: Sequence[Variant], repeats: int, progress: Callable[[int, int], None] | None
) -> list[list[float]]:
    """Seconds of a pass over the batch, for each variant and turn.

    A first turn is not counted: it compiles, looks whether the work is really done, and finds out how many
    passes the others take.
    """
    passes, seconds = [], []
    for turn in range(1 + repeats):
        for position, variant in enumerate(variants):
            if turn == 0:
                _check(variant)
                passes.append(min(MAX_PASSES, math.ceil(TURN_S / _seconds(variant, 1))))
                seconds.append([])
            else:
                seconds[position].append(_seconds(variant, passes[position]) / passes[position])
            if progress is not None:
                progress(turn * len(variants) + position + 1, (1 + repeats) * len(variants))
    return seconds


def _check(variant: Variant) -> None:
    """Raise `RuntimeError` where two passes, with other random numbers, do not give other finite images."""
    first, second = (_sums(variant.run()) for _ in range(2))
    if not (first.isfinite().all() and second.isfinite().all()):
        raise RuntimeError(f"{variant.implementation} in {variant.dtype} gives values that are not finite.")
    if (first != second).double().mean() < 0.5:
        raise RuntimeError(f"{variant.implementation} in {variant.dtype} distorts hardly any image.")


def _sums(result: Any) -> Tensor:
    """The sum of each image in float64; sums stay as they are."""
    if not isinstance(result, Tensor):
        return torch.stack([_sums(part) for part in result])
    return result.double().sum((-3, -2, -1)) if result.ndim >= 3 else result


def _seconds(variant: Variant, passes: int) -> float:
    """Time of some passes. On a GPU it is the GPU's own: the host queues them while the GPU still waits."""
    synchronise(variant.device)
    if variant.device.type == "cpu":
        start = time.perf_counter()
        for _ in range(passes):
            variant.run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE_AHEAD_CYCLES)
    begin.record()
    for _ in range(passes):
        variant.run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _rows(
    variants: Sequence[Variant], seconds: list[list[float]], size: int, batch: int, config: AugmentConfig
) -> list[dict[str, Any]]:
    """One row for each variant; the authors' are first. Medians over the turns, of ratios too."""
    rows = []
    for variant, times in zip(variants, seconds, strict=True):
        rates = [batch / t for t in times]
        row = {
            "implementation": variant.implementation,
            "views_px": size,
            "dtype": variant.dtype,
            "device": variant.device.type,
            "pairs_per_second": median(rates),
            "us_per_view": 1e6 / NUM_VIEWS / median(rates),
            "timed": "GPU events" if variant.device.type == "cuda" else "wall clock",
            "ratio_to_authors": median(theirs / ours for theirs, ours in zip(seconds[0], times, strict=True)),
            "repeats": len(times),
            "all_pairs_per_second": rates,
        }
        if variant.device.type == "cuda":
            row |= _traffic(variant, row["us_per_view"], size, config)
        rows.append(row)
    return rows


def _traffic(variant: Variant, us_per_view: float, size: int, config: AugmentConfig) -> dict[str, float]:
    """Bytes per view: of the floor, which reads each input and writes each output once, and planned for ours.

    `memory_floor_share` is the time of the floor, at the speed of a copy on this GPU, over the time taken.
    """
    values = 3 * size**2
    floor = values * (1 + DTYPES[variant.dtype].itemsize)
    traffic = {"floor_bytes_per_view": floor}
    if variant.implementation == "triton":  # which writes and reads 8 bits before each half of the blur
        traffic["planned_bytes_per_view"] = floor + 4 * values * mean(view.blur_p for view in config.views)
    floor_us = 1e6 * floor / _copy_bytes_per_second(variant.device)
    return traffic | {"memory_floor_share": floor_us / us_per_view}


def _copy_bytes_per_second(device: torch.device) -> float:
    """Bytes that a copy on the GPU reads and writes in a second."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Variant("copy", "uint8", device, lambda: target.copy_(source))
    _seconds(copy, 1)
    return 2 * COPIED_BYTES * MAX_PASSES / _seconds(copy, MAX_PASSES)
