"""One rank of the multi-process test of stopping: rank 1 alone receives a signal, before its third step.

Argument: the recipe. Writes how the run ended on this rank into the run directory.
"""

import json
import os
import signal
import sys
from pathlib import Path

import train.loop
from pipelines.batch import Batch
from train.config import load_config
from train.step import TrainStep

config = load_config(Path(sys.argv[1]))
rank = int(os.environ["RANK"])


class SignalledStep(TrainStep):
    def __call__(self, batch: Batch, step: int):
        if (rank, step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(batch, step)


train.loop.TrainStep = SignalledStep
result = train.loop.pretrain(config)
ended = {"stopped_by": result.stopped_by, "step": result.step}
(config.run_dir / f"rank{rank}.json").write_text(json.dumps(ended))
