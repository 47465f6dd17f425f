"""`fastbarlow bench loss`: every algorithm of the loss against the authors' formulation, side by side."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import Any

import torch

from model.loss import ALGORITHMS
from tools.bench.loss_measure import AUTHORS, Measured, Task, Variant, measure, measure_peaks
from tools.bench.ranks import run_ranks
from tools.environment import describe_environment
from train.distributed import process_group
from train.errors import ConfigError
from train.step import DTYPES


def bench_loss(
    samples: Sequence[int],
    width: int,
    *,
    dtype: str = "fp32",
    algorithms: Sequence[str] = (),
    repeats: int = 5,
    device: str = "auto",
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time, memory, precision and traffic of the loss, forward and backward, on random embeddings.

    In every round each variant, the authors' formulation and the matrix products alone take their turn, so
    that a slow moment of the machine hits all of them. One row for each size and variant; `speedup` is the
    median of the rounds' ratios, `over_products` the ratio of two medians, and peaks are bytes beyond the
    inputs. Among CPU ranks `bytes_sent` stands beside the plan's `bytes_planned`. `progress` hears of the
    rounds of one process.

    Raises `ConfigError` where samples, algorithms or processes do not fit, `DataError` where a rank fails or
    memory does not suffice.
    """
    _check(samples, width, algorithms, processes)
    kind = choose_device(device, processes)
    rows, plans = [], []
    for index, N in enumerate(samples):
        task = Task(N, width, DTYPES[dtype], tuple(algorithms), repeats)
        if processes > 1:
            ranks = run_ranks(partial(measure, task), processes, kind)
        else:
            done = partial(_advance, progress, index * (1 + repeats), len(samples) * (1 + repeats))
            with process_group(kind) as world:
                ranks = [measure(task, world, done)]
        peaks = [rank.peaks for rank in ranks]
        if kind == "cpu":
            peaks = run_ranks(partial(measure_peaks, task), processes, kind)
        rows += _rows(task, dtype, kind, ranks, peaks)
        chosen = ranks[0].plan
        estimates = [estimate._asdict() for estimate in chosen.estimates]
        plans.append({"n": N, "estimates": estimates, "algorithm": chosen.algorithm, "reason": chosen.reason})
    return {
        "bench": "loss",
        "date": datetime.now(UTC).date().isoformat(),
        "caches": "cold",
        "rows": rows,
        "plans": plans,
        "environment": describe_environment(torch.device(kind)),
    }


def choose_device(device: str, processes: int) -> str:
    """Where the ranks compute, "cpu" or "cuda"; "auto" takes GPUs if there is one for each.

    Raises `ConfigError` where "cuda" finds fewer.
    """
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < processes:
        raise ConfigError(
            f"{processes} ranks on GPUs need one each and this machine offers {gpus}; start fewer or compute "
            "on the CPU (--device cpu)."
        )
    return "cuda" if device != "cpu" and gpus >= processes else "cpu"


def _check(samples: Sequence[int], width: int, algorithms: Sequence[str], processes: int) -> None:
    """Refuse what cannot be measured."""
    unknown = next((name for name in algorithms if name not in ALGORITHMS), None)
    if unknown is not None:
        raise ConfigError(f"There is no algorithm {unknown!r}; choose from {', '.join(ALGORITHMS)}.")
    too_few = next((N for N in samples if N < 2), None)
    if too_few is not None:
        raise ConfigError(
            f"The loss normalises over the batch and cannot be measured on {too_few}; choose 2 or more."
        )
    uneven = next((N for N in samples if N % processes), None)
    if uneven is not None:
        raise ConfigError(f"{uneven} samples are not shared evenly by {processes} ranks; choose a multiple.")
    narrowest = max(2, processes)  # a feature for each rank
    if width < narrowest:
        raise ConfigError(f"Embeddings of width {width} are too narrow; choose {narrowest} or more.")


def _advance(progress: Callable[[int, int], None] | None, before: int, total: int, rounds: int) -> None:
    if progress is not None:
        progress(before + rounds, total)


def _rows(
    task: Task, dtype: str, kind: str, ranks: list[Measured], peaks: list[dict[Variant, int]]
) -> list[dict[str, Any]]:
    """One row for each variant. Of several ranks, the slowest, largest and busiest count."""

    def slowest(times: list[list[float]]) -> list[float]:
        return [1000 * max(turn) for turn in zip(*times, strict=True)]

    authors_ms = slowest([rank.seconds[AUTHORS] for rank in ranks])
    planned = {estimate.algorithm: estimate for estimate in ranks[0].plan.estimates}
    rows = []
    for variant in ranks[0].seconds:
        if variant == AUTHORS:
            continue
        algorithm, implementation = variant
        ms = slowest([rank.seconds[variant] for rank in ranks])
        products_ms = slowest([rank.products_seconds[algorithm] for rank in ranks])
        row = {
            "n": task.samples,
            "d": task.width,
            "world": len(ranks),
            "dtype": dtype,
            "device": kind,
            "algorithm": algorithm,
            "implementation": implementation,
            "ms": median(ms),
            "ms_authors": median(authors_ms),
            "speedup": median(a / b for a, b in zip(authors_ms, ms, strict=True)),
            "products_ms": median(products_ms),
            "over_products": median(ms) / median(products_ms),
            "peak_bytes": max(peak[variant] for peak in peaks),
            "peak_bytes_authors": max(peak[AUTHORS] for peak in peaks),
            "grad_rel_err": ranks[0].errors[variant],
            "grad_rel_err_authors": ranks[0].errors[AUTHORS],
            "repeats": task.repeats,
            "all_ms": ms,
            "all_ms_authors": authors_ms,
            "all_products_ms": products_ms,
        }
        if ranks[0].sent:
            row["bytes_sent"] = max(rank.sent[variant] for rank in ranks)
            row["bytes_sent_authors"] = max(rank.sent[AUTHORS] for rank in ranks)
            row["bytes_planned"] = planned[algorithm].bytes_sent
        rows.append(row)
    return rows
