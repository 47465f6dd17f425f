"""One rank of the multi-process test of the loss: its rows in, its terms and gradients out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from model.config import LossConfig
from model.loss import ALGORITHMS, barlow_loss

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
rows = [z.chunk(world_size)[rank] for z in torch.load(folder / "z.pt")]
for algorithm in ALGORITHMS:
    z_a, z_b = (z.clone().requires_grad_() for z in rows)
    terms = barlow_loss(z_a, z_b, LossConfig(algorithm=algorithm))
    terms.total.backward()
    torch.save(([t.detach() for t in terms], z_a.grad, z_b.grad), folder / f"{algorithm}-{rank}.pt")
dist.destroy_process_group()
