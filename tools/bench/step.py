"""`fastbarlow bench step`: the whole training step against the authors' formulation, side by side."""

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import Any

import torch

from pipelines.augment import choose
from pipelines.config import DataConfig
from pipelines.errors import DataError
from tools.bench.memory import is_out_of_memory
from tools.bench.ranks import run_ranks
from tools.bench.step_flop import flop_utilisation, loss_flop, our_loss_algorithm
from tools.bench.step_measure import (
    AUTHORS,
    OURS,
    Contender,
    Turn,
    contenders,
    measure,
    measure_resident_peaks,
)
from tools.environment import describe_environment
from train.config import RunConfig
from train.distributed import process_group
from train.errors import ConfigError
from train.flop import model_flop, peak_flops
from train.step import DTYPES

DEFAULT_BATCHES = {"cuda": (256, 512, 1024), "cpu": (16,)}
DEFAULT_STEPS = {"cuda": 20, "cpu": 1}

Turns = dict[str, list[Turn]]  # by contender


def bench_step(
    config: RunConfig,
    batches: Sequence[int] = (),
    *,
    live: DataConfig | None = None,
    steps: int | None = None,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Speed, memory and phases of the step of `config` and of the authors', on one device and random pixels.

    For each batch size one row each: ours; ours without distortions; the authors'; and with `live` ours on
    the batches of that loader. They take turns, so that a slow moment of the machine hits all of them; each
    turn has a network built anew, a warm-up and `steps` steps. `speedup` and `share_of_synthetic` are medians
    of the turns' ratios. What does not fit into memory is listed with its reason.

    Raises `ConfigError` for settings that cannot be measured, `DataError` where the loader fails or nothing
    fits.
    """
    _check(config, batches)
    load_average = os.getloadavg()[0]
    with process_group(config.train.device) as world:
        if world.size > 1:
            raise ConfigError("The benchmark of the step is for one device; start it without torchrun.")
        device = world.device
        batches = batches or DEFAULT_BATCHES[device.type]
        steps = steps or DEFAULT_STEPS[device.type]
        rows: list[dict[str, Any]] = []
        unavailable: list[dict[str, Any]] = []
        for position, N in enumerate(batches):
            resized = _with_batch(config, N)
            found = contenders(resized, live, device)
            advance = partial(_advance, progress, position * repeats, len(batches) * repeats)
            turns, reasons = _take_turns(found, steps, repeats, device, advance)
            memory = _memory(resized, turns, device)
            rows += _rows(resized, found, turns, memory, device)
            unavailable += [{"name": name, "batch_size": N, "reason": why} for name, why in reasons.items()]
    if not rows:
        raise DataError(
            f"No step fits into the memory of {device}; choose a smaller --batch, or raise "
            "train.micro_batches."
        )
    return {
        "bench": "step",
        "date": datetime.now(UTC).date().isoformat(),
        "settings": _settings(config, device),
        "steps": steps,
        "repeats": repeats,
        "rows": rows,
        "unavailable": unavailable,
        "load_average": load_average,
        "environment": describe_environment(device),
    }


def _check(config: RunConfig, batches: Sequence[int]) -> None:
    if config.train.precision == "fp64":
        raise ConfigError(
            "The benchmark is of speed, and train.precision fp64 is for comparing runs; choose another."
        )
    too_few = next((N for N in batches if N < 2), None)
    if too_few is not None:
        raise ConfigError(f"A step normalises over the batch and needs 2 pairs or more, not {too_few}.")


def _with_batch(config: RunConfig, N: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_size": N})})


def _advance(progress: Callable[[int, int], None] | None, before: int, total: int, rounds: int) -> None:
    if progress is not None:
        progress(before + rounds, total)


def _take_turns(
    found: Sequence[Contender],
    steps: int,
    repeats: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> tuple[Turns, dict[str, str]]:
    """The turns of all that fit into memory, and the reasons of those that do not."""
    turns: Turns = {contender.name: [] for contender in found}
    reasons: dict[str, str] = {}
    for turn in range(repeats):
        for contender in (c for c in found if c.name not in reasons):
            try:
                turns[contender.name].append(measure(contender, steps, device))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reasons[contender.name] = "does not fit into memory"
        advance(turn + 1)
    return {name: taken for name, taken in turns.items() if name not in reasons}, reasons


def _memory(config: RunConfig, turns: Turns, device: torch.device) -> dict[str, int]:
    """Bytes of each contender's step. The CPU's come from a fresh process, and not for a loader at work."""
    if device.type == "cpu" and turns:
        (peaks,) = run_ranks(partial(measure_resident_peaks, config), 1, "cpu")
        return peaks
    # In the first turn libraries try algorithms out, which may take more.
    return {name: taken[-1].peak_bytes for name, taken in turns.items()}


def _rows(
    config: RunConfig,
    found: Sequence[Contender],
    turns: Turns,
    memory: dict[str, int],
    device: torch.device,
) -> list[dict[str, Any]]:
    model, N = config.model, config.train.batch_size
    network_flop = model_flop(model, N, config.data.image_size)
    dtype = DTYPES[config.train.precision]
    rows = []
    for contender in (c for c in found if c.name in turns):
        taken = turns[contender.name]
        seconds = median(turn.seconds for turn in taken)
        algorithm = "dense" if contender.name == AUTHORS else our_loss_algorithm(model, N, dtype, device)
        flop = network_flop + loss_flop(algorithm, N, model.projector_widths[-1])
        is_live = contender.to_drop > 0
        rows.append(
            {
                "name": contender.name,
                "batch_size": N,
                "precision": contender.precision,
                "pairs_per_second": N / seconds,
                "ms_per_step": 1000 * seconds,
                "speedup": _ratio(turns, AUTHORS, contender.name),
                "share_of_synthetic": _ratio(turns, OURS, contender.name) if is_live else None,
                "loss_algorithm": algorithm,
                "flop_per_step": flop,
                "tflops": flop / seconds / 1e12,
                "mfu": flop_utilisation(flop, seconds, _peak(contender, device)),
                "peak_memory_bytes": memory.get(contender.name),
                "phases_ms": {
                    phase: 1000 * median(turn.phases[phase] for turn in taken) for phase in taken[0].phases
                },
                "all_ms_per_step": [1000 * turn.seconds for turn in taken],
            }
        )
    return rows


def _ratio(turns: Turns, slow: str, fast: str) -> float | None:
    """How many times as fast the second one is; None where one of them has not been measured."""
    if slow not in turns or fast not in turns:
        return None
    return median(a.seconds / b.seconds for a, b in zip(turns[slow], turns[fast], strict=True))


def _peak(contender: Contender, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), contender.precision)


def _settings(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What the speed depends on, as configured."""
    augment = config.data.augment.implementation
    return {
        "backbone": config.model.backbone,
        "small_stem": config.model.small_stem,
        "projector": config.model.projector,
        "norm": config.model.norm,
        "image_size": config.data.image_size,
        "augment": "dali" if augment == "dali" else choose(augment, device),
        "loss_algorithm": config.model.loss.algorithm,
        "loss_implementation": config.model.loss.implementation,
        "precision": config.train.precision,
        "compile": config.train.compile,
        "cuda_graph": config.train.cuda_graph,
        "micro_batches": config.train.micro_batches,
    }
