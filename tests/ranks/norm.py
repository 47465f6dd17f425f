"""One rank of the multi-process test of batch-norm: its samples in, outputs, gradients and buffers out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from model.norm import synchronise_norms

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
module, x, weight = torch.load(folder / "norm.pt", weights_only=False)
module = synchronise_norms(module)
x, weight = (t.chunk(world_size)[rank] for t in (x, weight))
x.requires_grad_()
y = module(x)
(y * weight).sum().backward()
for parameter in module.parameters():
    dist.all_reduce(parameter.grad)
result = {
    "y": y.detach(),
    "grad": x.grad,
    "parameter_grads": [p.grad for p in module.parameters()],
    "state": module.state_dict(),
}
torch.save(result, folder / f"norm-{rank}.pt")
dist.destroy_process_group()
