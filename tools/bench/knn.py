"""How long exact kNN takes among a large bank, and how much memory beyond the features.

Shape legend: N samples of the bank, M queries, F feature width.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from eval.feature_memory import MAPPED_FROM_BYTES, allocate_features
from eval.knn import knn_accuracies
from tools.bench.loader_usage import PeakMemory
from train.errors import ConfigError

CLASSES, TEMPERATURE = 1000, 0.07
_FILLED_AT_ONCE = 8192

Progress = Callable[[int, int], None]


def bench_knn(
    rows: int,
    width: int,
    queries: int,
    ks: Sequence[int],
    device: torch.device,
    *,
    repeats: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Seconds, rates and peak memory of a search among random features; they show nothing else.

    `seconds` is the median over the turns, and rates follow it. `peak_memory_mb` is what the search takes
    beyond the features, without the pages of a mapped file; None where the system does not tell.

    Raises `ConfigError` where a k is larger than the bank, `DataError` where the disk has no room for the
    features.
    """
    if max(ks) > rows:
        raise ConfigError(f"--k {max(ks)} is more than the {rows} rows of the bank; lower it.")
    random = torch.Generator().manual_seed(0)
    bank_NF = allocate_features(rows, width)
    for block_nF in bank_NF.split(_FILLED_AT_ONCE):  # written, so that no page is one of zeros
        block_nF.normal_(generator=random)
    queries_MF = torch.randn(queries, width, generator=random)
    labels_N = torch.randint(CLASSES, (rows,), generator=random)
    labels_M = torch.randint(CLASSES, (queries,), generator=random)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    all_seconds = []
    with PeakMemory() as memory:
        for turn in range(repeats):
            report = _turn_of(turn, repeats, progress)
            start = time.perf_counter()
            knn_accuracies(bank_NF, labels_N, queries_MF, labels_M, ks, TEMPERATURE, device, progress=report)
            all_seconds.append(time.perf_counter() - start)
    seconds = median(all_seconds)
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "bench": "knn",
        "device": device.type,
        "rows": rows,
        "width": width,
        "queries": queries,
        "k": list(ks),
        "precision": "float16, summed in float32" if device.type == "cuda" else "float32",
        "features_mb": 4 * rows * width / 1e6,
        "features_in_a_mapped_file": 4 * rows * width >= MAPPED_FROM_BYTES,
        "seconds": seconds,
        "all_seconds": all_seconds,
        "queries_per_second": queries / seconds,
        "tflop_per_second": 2 * rows * width * queries / seconds / 1e12,
        "peak_memory_mb": None if memory.bytes is None else memory.bytes / 1e6,
        "peak_gpu_memory_mb": None if on_gpu is None else on_gpu / 1e6,
    }


def _turn_of(turn: int, turns: int, progress: Progress | None) -> Progress:
    """Progress of one turn as a part of all."""
    return lambda done, total: progress(turn * total + done, turns * total) if progress else None
