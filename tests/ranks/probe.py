"""One rank of the multi-process test of the probe: its rows of each step in, its probe's state out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from train.probe import OnlineProbe

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
steps, num_classes, lr = torch.load(folder / "given.pt")
probe = OnlineProbe(steps[0][0].shape[1], num_classes, lr, torch.device("cpu"))
for of_all_ranks in steps:
    probe.learn(*(data.chunk(world_size)[rank] for data in of_all_ranks))
torch.save((probe.weight_CE, probe.right), folder / f"{rank}.pt")
dist.destroy_process_group()
