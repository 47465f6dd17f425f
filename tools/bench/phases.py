"""What it costs a run to know its phases: `python -m tools.bench.phases CONFIG [KEY=VALUE ...]`.

Steps on synthetic batches, with everything that names and times their phases and without: the ranges of
`phase_range`, and the stamps of a `PhaseClock` in every step, although a run stamps reported ones only. They
take turns step by step, and in going first, so that a slow moment of the machine hits both. Prints one JSON
object, also with what the calls of one step take by themselves.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from pipelines.loaders import build_loader
from tools.bench.timing import MIN_WARMUP, endless, synchronise
from tools.environment import describe_environment
from train import step as step_module
from train.config import RunConfig, load_config
from train.distributed import process_group
from train.loop import build_twin, configure_backends
from train.phases import PhaseClock, phase_range
from train.step import PHASES, TrainStep

STEPS, REPEATS = 20, 5
READY_BATCHES = 3  # which both kinds of step get equally often
CALLS = 1000  # of the calls by themselves


def bench_phases(config: RunConfig) -> dict[str, Any]:
    """Median seconds of a step with and without, of each repeat, and their ratio."""
    synthetic = config.data.model_copy(update={"loader": "synthetic"})
    with process_group(config.train.device) as world:
        device = world.device
        configure_backends(config)
        loader = build_loader(synthetic, seed=0, batch_size=config.train.batch_size, device=device)
        batches = endless(loader)
        ready = cycle(list(islice(batches, READY_BATCHES)))
        batches.close()
        loader.close()
        clock = PhaseClock(device)
        train_step = TrainStep(config, build_twin(config, device).train(), 1000, mark=clock.mark)

        def seconds() -> float:
            synchronise(device)
            start = time.perf_counter()
            train_step(next(ready), 0)
            synchronise(device)
            return time.perf_counter() - start

        for _ in range(MIN_WARMUP):
            seconds()
        repeats = []
        for _ in range(REPEATS):
            times: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(STEPS):
                for is_with in (turn % 2 == 0, turn % 2 == 1):  # neither always comes first
                    if is_with:
                        clock.start()
                    with nullcontext() if is_with else _no_phases():
                        times[is_with].append(seconds())
                    if is_with:
                        clock.take()
            repeats.append((median(times[True]), median(times[False])))

        start = time.perf_counter()
        for _ in range(CALLS):
            clock.start()
            for phase in PHASES:
                with phase_range(phase, device):
                    clock.mark(phase)
        calls = (time.perf_counter() - start) / CALLS
        return {
            "bench": "phases",
            "steps": STEPS,
            "step_seconds": [a for a, _ in repeats],
            "step_seconds_without": [b for _, b in repeats],
            "ratio": median(a / b for a, b in repeats),
            "seconds_of_calls": calls,
            "share_of_calls": calls / median(b for _, b in repeats),
            "environment": describe_environment(device),
        }


@contextmanager
def _no_phases() -> Iterator[None]:
    """Steps whose phases nobody names."""
    with patch.object(step_module, "phase_range", lambda phase, device: nullcontext()):
        yield


if __name__ == "__main__":
    print(json.dumps(bench_phases(load_config(Path(sys.argv[1]), sys.argv[2:]))))
