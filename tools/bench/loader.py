"""`fastbarlow bench loader`: every loader and the authors' data path side by side, and what limits them."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipelines.augment import distort
from pipelines.config import DataConfig
from pipelines.errors import DataError
from pipelines.loaders import build_loader
from pipelines.source import Source, open_source
from tools.bench.loader_authors import AUTHORS, authors_loader, image_folder
from tools.bench.loader_measure import Contender, Setting, Turn, measure, peak_memory
from tools.bench.timing import endless, warmup_batches
from tools.environment import describe_environment

CROPS, VIEWS = "crops", "views"


def bench_loaders(
    path: Path,
    names: Sequence[str],
    setting: Setting,
    *,
    repeats: int,
    seconds: float,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Pairs/s that the named loaders and the authors' data path deliver from the dataset at `path`.

    Each loader delivers "crops", which is what it yields, and "views": both distorted and normalised in
    float32, by `distort`, while the loader goes on, as in training. All take turns, each built anew, so that
    a slow moment of the machine hits all of them; so do the stages, each alone. A turn lasts `seconds`. In a
    first turn, which is not counted, libraries load, code compiles and memory is measured. Ratios are medians
    of the turns' ratios.

    The authors' workers read the images as files, at most `loader_authors.MAX_FILES` of them. A loader that
    cannot read the dataset is listed with its reason. Raises `DataError` where none can, or where the dataset
    has fewer images than a batch.
    """
    source = open_source(path)
    if len(source) < setting.batch_size:
        raise DataError(f"{path} has {len(source)} images; choose a --batch of at most {len(source)}.")
    load_average, unavailable = os.getloadavg()[0], {}
    loaders = [_loader(path, name, delivers, setting) for name in names for delivers in (CROPS, VIEWS)]
    stages = _stages(source, setting, unavailable)
    with image_folder(source) as folder:
        authors = authors_loader(folder, setting)
        memory, turns = _take_turns(
            [authors, *loaders, *stages], names, repeats, seconds, setting.device, unavailable, progress
        )
    floor = next((turns[stage] for stage in stages if stage.name == "decode"), None)
    rows = [
        _row(contender, turns[contender], turns[authors], floor, memory[contender])
        for contender in (authors, *loaders)
        if contender.name not in unavailable
    ]
    stage_rows = [_stage_row(stage, turns[stage], setting.device) for stage in stages]
    return {
        "bench": "loader",
        "date": datetime.now(UTC).date().isoformat(),
        "dataset": str(path),
        "images": len(source),
        "image_size": setting.image_size,
        "batch_size": setting.batch_size,
        "workers": setting.workers,
        "repeats": repeats,
        "seconds": seconds,
        "rows": rows,
        "stages": stage_rows,
        "unavailable": unavailable,
        "limit": _limit(rows, stage_rows, setting),
        "load_average": load_average,
        "environment": describe_environment(setting.device),
    }


def _loader(path: Path, name: str, delivers: str, setting: Setting) -> Contender:
    config = DataConfig(
        path=path,
        loader=name,
        image_size=setting.image_size,
        workers=setting.workers,
        augment=setting.augment,
    )
    return Contender(
        name,
        delivers,
        partial(_stream, config, delivers, setting),
        pairs=setting.batch_size,
        warmup=warmup_batches(config),
        cycle=setting.workers,
    )


@contextmanager
def _stream(config: DataConfig, delivers: str, setting: Setting) -> Iterator[Iterator[Any]]:
    loader = build_loader(config, seed=0, batch_size=setting.batch_size, device=setting.device)
    batches = endless(loader)
    try:
        if delivers == CROPS:
            yield batches
        else:
            yield (distort(b.views_VNHWC, b.params, config.augment, torch.float32) for b in batches)
    finally:
        batches.close()
        loader.close()


def _stages(source: Source, setting: Setting, unavailable: dict[str, str]) -> list[Contender]:
    try:
        from tools.bench.loader_stages import draw_sample, stages  # which needs libturbojpeg

        return stages(draw_sample(source), setting)
    except DataError as error:
        unavailable["stages"] = str(error)
        return []


def _take_turns(
    contenders: Sequence[Contender],
    names: Sequence[str],
    repeats: int,
    seconds: float,
    device: torch.device,
    unavailable: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[Contender, int | None], dict[Contender, list[Turn]]]:
    """Bytes of memory and all turns; one of `names` that fails joins `unavailable` with its reason."""
    memory = dict.fromkeys(contenders)
    turns: dict[Contender, list[Turn]] = {contender: [] for contender in contenders}
    for turn in range(1 + repeats):
        for position, contender in enumerate(contenders):
            try:
                if contender.name in unavailable:
                    pass
                elif turn == 0:
                    memory[contender] = peak_memory(contender, device)
                else:
                    turns[contender].append(measure(contender, seconds, device))
            except DataError as error:
                if contender.name not in names:
                    raise
                unavailable[contender.name] = str(error)
                if unavailable.keys() >= set(names):
                    raise
            if progress is not None:
                progress(turn * len(contenders) + position + 1, (1 + repeats) * len(contenders))
    return memory, turns


def _row(
    contender: Contender,
    turns: Sequence[Turn],
    authors: Sequence[Turn],
    floor: Sequence[Turn] | None,
    memory: int | None,
) -> dict[str, Any]:
    return {
        "loader": contender.name,
        "delivers": contender.delivers,
        **_figures(turns),
        "ratio_to_authors": _ratio(turns, authors),
        "share_of_decode_floor": _ratio(turns, floor) if floor else None,
        "peak_memory_mb": None if memory is None else memory / 1e6,
    }


def _stage_row(stage: Contender, turns: Sequence[Turn], device: torch.device) -> dict[str, Any]:
    """What runs on a GPU takes no core: the host only starts it."""
    on_gpu = device.type == "cuda" and stage.name in ("augment", "copy")
    row = {"stage": stage.name, "device": device.type if on_gpu else "cpu", **_figures(turns)}
    return row | ({"cores_used": None, "pairs_per_core_second": None} if on_gpu else {})


def _figures(turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "pairs_per_second": median(turn.pairs_per_second for turn in turns),
        "cores_used": median(turn.cores for turn in turns),
        "pairs_per_core_second": median(turn.pairs_per_core_second for turn in turns),
        "all_pairs_per_second": [turn.pairs_per_second for turn in turns],
        "all_cores_used": [turn.cores for turn in turns],
    }


def _ratio(turns: Sequence[Turn], others: Sequence[Turn]) -> float:
    pairs = zip(turns, others, strict=True)
    return median(turn.pairs_per_second / other.pairs_per_second for turn, other in pairs)


def _limit(
    rows: Sequence[dict[str, Any]], stages: Sequence[dict[str, Any]], setting: Setting
) -> dict[str, Any]:
    """The fastest of our loaders at what a step on the device takes, and the slowest stage of getting there.

    A GPU distorts by itself, so its step takes crops; on the CPU the loader and `distort` share the cores.
    """
    needs = CROPS if setting.device.type == "cuda" else VIEWS
    best = max(
        (row for row in rows if row["loader"] != AUTHORS and row["delivers"] == needs),
        key=lambda row: row["pairs_per_second"],
    )
    by_rate = sorted(
        (stage for stage in stages if needs == VIEWS or stage["stage"] != "augment"),
        key=lambda stage: stage["pairs_per_second"],
    )
    sentence = (
        f"This machine feeds a step of at most {best['pairs_per_second']:.0f} pairs/s "
        f"(loader {best['loader']}, {setting.workers} workers)"
    )
    limit = {
        "needs": needs,
        "loader": best["loader"],
        "pairs_per_second": best["pairs_per_second"],
        "stage": None,
        "sentence": f"{sentence}.",
    }
    if not by_rate:
        return limit
    slowest = by_rate[0]
    reason = f"its slowest stage is {slowest['stage']}, alone {slowest['pairs_per_second']:.0f} pairs/s"
    return limit | {"stage": slowest["stage"], "sentence": f"{sentence}: {reason}."}
