"""Training runs that note the samples of each step in `samples.txt`; the last run may kill itself.

Arguments: the step before which the last run kills itself (-1: never), then the recipes of the runs.
With several ranks the last one does that, and one that torchrun has started again lives on.
It also notes, in `written.txt`, what it has opened in the run directory for writing.
"""

import os
import signal
import sys
from pathlib import Path

import torch

import train.loop
from pipelines.batch import Batch
from train.config import load_config
from train.step import TrainStep

kill_before, *recipes = int(sys.argv[1]), *map(Path, sys.argv[2:])
torch.set_num_threads(1)
is_last_rank = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
for recipe in recipes:
    config = load_config(recipe)
    written: set[str] = set()

    class RecordedStep(TrainStep):
        record = config.run_dir / "samples.txt"
        kill_before = kill_before if recipe is recipes[-1] and not is_restarted else -1

        def __call__(self, batch: Batch, step: int):
            if step == self.kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            with self.record.open("a") as file:
                print(step, *batch.indices_N.tolist(), file=file)
            return super().__call__(batch, step)

    def note_writing(event: str, details: tuple, run_dir: str = str(config.run_dir), written=written) -> None:
        if event == "open" and str(details[0]).startswith(run_dir) and details[2] & (os.O_WRONLY | os.O_RDWR):
            written.add(str(details[0]))

    sys.addaudithook(note_writing)
    if is_last_rank:
        train.loop.TrainStep = RecordedStep
    result = train.loop.pretrain(config)
    if is_last_rank:
        (config.run_dir / "written.txt").write_text("\n".join(sorted(written)))
    if result.stopped_by is not None:
        sys.exit(75)  # as the command does
