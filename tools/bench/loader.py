"""`fastbarlow bench loader`: how many pairs of views each loader delivers per second, side by side."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from pipelines.errors import DataError
from pipelines.loaders import build_loader
from tools.bench.timing import drop, endless, seconds_for, warmup_batches
from tools.environment import describe_environment
from train.config import RunConfig


def bench_loaders(
    config: RunConfig,
    names: Sequence[str],
    *,
    repeats: int,
    batches: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Pairs/s of each named loader on the dataset and with the settings of `config`.

    The loaders take turns, each time built anew, so that a slow moment of the machine hits all of them. Each
    turn first takes more batches unmeasured than a loader prepares ahead. A loader that cannot read the
    dataset is listed with its reason. Raises `DataError` where none can.
    """
    rates: dict[str, list[float]] = {name: [] for name in names}
    unavailable: dict[str, str] = {}
    for turn in range(repeats):
        for position, name in enumerate(names):
            if name not in unavailable:
                try:
                    rates[name].append(_pairs_per_second(config, name, batches, device))
                except DataError as error:
                    unavailable[name] = str(error)
            if progress is not None:
                progress(turn * len(names) + position + 1, repeats * len(names))
    rates = {name: values for name, values in rates.items() if name not in unavailable}
    if not rates:
        raise DataError(next(iter(unavailable.values())))
    medians = {name: median(values) for name, values in rates.items()}
    slowest = min(medians.values())
    return {
        "bench": "loader",
        "dataset": str(config.data.path),
        "image_size": config.data.image_size,
        "batch_size": config.train.batch_size,
        "workers": config.data.workers,
        "batches": batches,
        "repeats": repeats,
        "median_pairs_per_second": medians,
        "ratio_to_slowest": {name: value / slowest for name, value in medians.items()},
        "pairs_per_second": rates,
        "unavailable": unavailable,
        "environment": describe_environment(device),
    }


def _pairs_per_second(config: RunConfig, name: str, batches: int, device: torch.device) -> float:
    data = config.data.model_copy(update={"loader": name})
    loader = build_loader(data, seed=config.seed, batch_size=config.train.batch_size, device=device)
    stream = endless(loader)
    try:
        drop(stream, warmup_batches(data))
        return batches * config.train.batch_size / seconds_for(stream, batches, device)
    finally:
        stream.close()
        loader.close()
