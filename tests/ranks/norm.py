"""One rank of the multi-process test of batch-norm: its samples in, outputs, gradients and buffers out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from model.norm import TwinBatchNorm, joined_views, synchronise_norms

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
given = torch.load(folder / "given.pt", weights_only=False)
network = synchronise_norms(given["network"])
views, weights = (given[name].chunk(world_size, 1)[rank].clone() for name in ("views", "weights"))
views.requires_grad_()

calls = 0


def count(name: str) -> None:
    call = getattr(dist, name)

    def counted(*args: object, **kwargs: object) -> object:
        global calls
        calls += 1
        return call(*args, **kwargs)

    setattr(dist, name, counted)


for name in vars(dist):
    if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv")):
        count(name)

with joined_views([m for m in network.values() if isinstance(m, TwinBatchNorm)], 2):
    first = network["relu"](network["conv"](views.flatten(0, 1)))
    third = network["residual"](network["plain"](first), first)
    z = network["flat"](network["linear"](third.mean((2, 3)))).unflatten(0, (2, -1))
collectives = {"forward": calls}
(z * weights).sum().backward()
collectives["backward"] = calls - collectives["forward"]
for parameter in network.parameters():
    dist.all_reduce(parameter.grad)
result = {
    "z": z.detach(),
    "dviews": views.grad,
    "dparameters": [p.grad for p in network.parameters()],
    "state": network.state_dict(),
    "collectives": collectives,
}
torch.save(result, folder / f"rank-{rank}.pt")
dist.destroy_process_group()
