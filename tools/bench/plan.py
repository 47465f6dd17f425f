"""`fastbarlow bench plan`: what `fastbarlow plan` predicts for ranks on this CPU, beside what they do."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from model.loss import ALGORITHMS
from tools.bench.ranks import run_ranks
from tools.bench.step_measure import READY_BATCHES
from tools.bench.timing import PhaseTimer
from tools.environment import describe_environment
from tools.plan.cluster import CPU, make_cluster
from tools.plan.plan import Planner, Prediction, with_train
from tools.plan.step import BUCKETS, StepCost
from tools.processes import run_processes
from train.config import RunConfig
from train.distributed import World
from train.errors import ConfigError
from train.loop import build_twin, configure_backends, over_ranks, rank_loader
from train.step import TrainStep

PROFILED, MEASURED = (8, 64), (16, 32, 128)  # pairs of a rank: what is profiled, what is predicted
PROFILED_LOSS = "gram"
WARMUP = 1  # steps
SMALL_BYTES, COLLECTIVE_REPEATS = 4 << 10, 20  # what the statistics of a norm carry


class Case(NamedTuple):
    """One setting that is predicted and measured."""

    ranks: int
    pairs: int  # of each rank
    algorithm: str


class StepTimes(NamedTuple):
    seconds: list[float]  # of each measured step
    phases: dict[str, float]  # mean seconds


def bench_plan(
    config: RunConfig,
    *,
    ranks: Sequence[int] = (1, 2),
    profiled: Sequence[int] = PROFILED,
    pairs: Sequence[int] = MEASURED,
    steps: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Predict and measure the step of `config` on gloo ranks of one thread each, from ready batches.

    For each number of ranks W of `ranks`:
    1. W processes that know nothing of each other measure their steps at the batch sizes `profiled`, all at
       once, as the ranks share the machine's memory and caches; W ranks measure their collectives. Both are
       written as profiles.
    2. The plan reads these profiles, nothing else, and predicts the steps of 3.
    3. W ranks measure the step at each size of `pairs`, with each loss; the slowest rank's median counts.
    Raises `ConfigError` for what cannot be measured, `DataError` where a rank fails.
    """
    config = _on_cpu(config)
    if min(*ranks, steps) < 1 or min(*profiled, *pairs) < 2:
        raise ConfigError(
            "A step normalises over the batch: ranks and steps must be 1 or more, pairs 2 or more."
        )
    total, done = 3 * len(ranks), 0
    rows, collectives = [], {}

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for W in ranks:
        job = partial(_measure_alone, config, [Case(1, n, PROFILED_LOSS) for n in profiled], steps)
        alone = run_processes([job] * W, poll=lambda: None)[0]  # 1
        advance()
        collectives[W] = run_ranks(_measure_collectives, W, "cpu")[0] if W > 1 else []
        advance()
        profiles = [
            _profile(config, n, times, collectives[W]) for n, times in zip(profiled, alone, strict=True)
        ]
        cases = [Case(W, n, name) for n in pairs for name in ALGORITHMS if name != "sharded" or W > 1]
        predictions = _predict(config, cases, profiles)  # 2
        measured = run_ranks(partial(_measure_cases, config, cases, steps), W, "cpu")  # 3
        advance()
        for case, predicted, *of_ranks in zip(cases, predictions, *measured, strict=True):
            slowest = max(of_ranks, key=lambda times: median(times.seconds))
            rows.append(_row(case, predicted.step, slowest))
    return {
        "bench": "plan",
        "date": datetime.now(UTC).date().isoformat(),
        "steps": steps,
        "profiled_pairs": list(profiled),
        "collectives": collectives,
        "rows": rows,
        "environment": describe_environment(torch.device("cpu")),
    }


def _on_cpu(config: RunConfig) -> RunConfig:
    if config.train.precision not in ("fp32", "bf16"):
        raise ConfigError(f"On the CPU a plan is of fp32 or bf16, not {config.train.precision}.")
    data = config.data.model_copy(update={"loader": "synthetic"})
    return with_train(config.model_copy(update={"data": data}), device="cpu", cuda_graph=False, compile=False)


def _with_case(config: RunConfig, case: Case) -> RunConfig:
    loss = config.model.loss.model_copy(update={"algorithm": case.algorithm, "temperature": None})
    model = config.model.model_copy(update={"loss": loss})
    config = config.model_copy(update={"model": model})
    return with_train(config, batch_size=case.ranks * case.pairs, micro_batches=1)


def _measure_alone(config: RunConfig, cases: Sequence[Case], steps: int) -> list[StepTimes]:
    return _measure_cases(config, cases, steps, World(0, 1, torch.device("cpu")))


def _measure_cases(config: RunConfig, cases: Sequence[Case], steps: int, world: World) -> list[StepTimes]:
    torch.set_num_threads(1)
    return [_measure_step(_with_case(config, case), steps, world) for case in cases]


def _measure_step(config: RunConfig, steps: int, world: World) -> StepTimes:
    """Steps of this rank on batches that are ready before the clock starts."""
    configure_backends(config)
    with closing(rank_loader(config, world)) as loader:
        ready = cycle(list(islice(loader.epoch(0), READY_BATCHES)))
        timer = PhaseTimer(world.device)
        network = over_ranks(build_twin(config, world.device).train(), config, world)
        train_step = TrainStep(config, network, loader.steps_per_epoch, mark=timer.mark)
        seconds = []
        for number in range(WARMUP + steps):
            if number == WARMUP:
                timer.clear()
            batch = next(ready)
            world.gather(None)  # all begin together
            start = time.perf_counter()
            timer.start()
            train_step(batch, number)
            if number >= WARMUP:
                seconds.append(time.perf_counter() - start)
        return StepTimes(seconds, timer.mean_seconds())


def _measure_collectives(world: World) -> list[dict[str, Any]]:
    """One sum as large as a bucket of gradients, and small ones as of the statistics."""
    torch.set_num_threads(1)
    found = []
    for what, operation, size in (
        ("gradients", "all_reduce", BUCKETS[1]),
        ("statistics", "all_reduce", SMALL_BYTES),
        ("statistics", "all_gather", SMALL_BYTES),
    ):
        sent = torch.zeros(size // 4)
        received = torch.zeros(world.size * len(sent))
        seconds = []
        for _ in range(COLLECTIVE_REPEATS):
            world.gather(None)
            start = time.perf_counter()
            if operation == "all_reduce":
                dist.all_reduce(sent)
            else:
                dist.all_gather_into_tensor(received, sent)
            seconds.append(time.perf_counter() - start)
        one = median(seconds)
        found.append(
            {
                "operation": operation,
                "what": what,
                "ranks": world.size,
                "bytes": size,
                "count": 1,
                "seconds": one,
                "bytes_per_second": size / one,
            }
        )
    return found


def _profile(
    config: RunConfig, pairs: int, times: StepTimes, collectives: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `fastbarlow profile` would have written, as far as a plan reads it."""
    seconds = median(times.seconds)
    return {
        "environment": {"device": CPU},
        "settings": {
            "backbone": config.model.backbone,
            "projector": config.model.projector,
            "image_size": config.data.image_size,
            "batch_size": pairs,
            "micro_batches": 1,
            "precision": config.train.precision,
            "norm": config.model.norm,
            "ranks": 1,
            "loss_algorithm": PROFILED_LOSS,
        },
        "ceilings": {"step": {"pairs_per_second": pairs / seconds}},
        "run": {"phases": times.phases},
        "collectives": collectives,
    }


def _predict(
    config: RunConfig, cases: Sequence[Case], profiles: Sequence[dict[str, Any]]
) -> list[Prediction]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.json" for number in range(len(profiles))]
        for path, profile in zip(paths, profiles, strict=True):
            path.write_text(json.dumps(profile), encoding="utf-8")
        return [
            Planner(
                _with_case(config, case),
                make_cluster(CPU, case.ranks, per_machine=case.ranks, link=None),
                profiles=paths,
            ).predict()
            for case in cases
        ]


def _row(case: Case, predicted: StepCost, measured: StepTimes) -> dict[str, Any]:
    seconds = median(measured.seconds)
    return {
        "ranks": case.ranks,
        "pairs_per_rank": case.pairs,
        "loss": case.algorithm,
        "predicted_ms": 1000 * predicted.seconds,
        "measured_ms": 1000 * seconds,
        "all_ms": [1000 * s for s in measured.seconds],
        "ratio": predicted.seconds / seconds,
        "predicted_parts_ms": {name: 1000 * s for name, s in predicted.parts.items()},
        "measured_phases_ms": {name: 1000 * s for name, s in measured.phases.items()},
    }
