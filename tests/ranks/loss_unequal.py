"""One rank of the test that ranks with different numbers of samples are refused: the sentence out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from model.config import LossConfig
from model.errors import ModelError
from model.loss import barlow_loss

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
equal, unequal = torch.randn(4, 6), torch.randn(4 - rank, 6)
for algorithm in ("dense", "gram", "sharded"):
    config = LossConfig(algorithm=algorithm)
    barlow_loss(equal, equal, config)
    try:
        barlow_loss(unequal, unequal, config)
    except ModelError as error:
        (folder / f"{algorithm}-{rank}.txt").write_text(str(error))
dist.destroy_process_group()
