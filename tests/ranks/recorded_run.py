"""Training runs that note the samples of each step in `samples.txt`; the last run may kill itself.

Arguments: the step before which the last run kills itself (-1: never), then the recipes of the runs.
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
for recipe in recipes:
    config = load_config(recipe)

    class RecordedStep(TrainStep):
        record = config.run_dir / "samples.txt"
        kill_before = kill_before if recipe is recipes[-1] else -1

        def __call__(self, batch: Batch, step: int):
            if step == self.kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            with self.record.open("a") as file:
                print(step, *batch.indices_N.tolist(), file=file)
            return super().__call__(batch, step)

    train.loop.TrainStep = RecordedStep
    train.loop.pretrain(config)
