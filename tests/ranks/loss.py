"""One rank of the multi-process tests of the loss: its rows in, its terms and gradients out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model.loss import barlow_loss, choose
from model.loss.plan import Hardware
from model.norm import synchronise_norms

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
given = torch.load(folder / "given.pt", weights_only=False)


def hardware_of_this_rank(*_: object) -> Hardware:
    """By which ranks 0 and 1 would plan differently."""
    return Hardware(1e12, 1e10, 1e9, 1e9) if rank == 0 else Hardware(1e12, 1e10, 1e9, 0)


choose.hardware_at_hand = hardware_of_this_rank

rows = [z.chunk(world_size)[rank] for z in given["embeddings"]]
embeddings = []
for config, dtype in given["cases"]:
    z_a, z_b = (z.to(dtype, copy=True).requires_grad_() for z in rows)
    terms = barlow_loss(z_a, z_b, config)
    terms.total.backward()
    embeddings.append(([t.detach() for t in terms], z_a.grad, z_b.grad))

x_a, x_b = (x.chunk(world_size)[rank] for x in given["inputs"])
network = DistributedDataParallel(synchronise_norms(given["network"]))
parameters = []
for config in given["configs"]:
    network.zero_grad(set_to_none=True)
    loss = barlow_loss(network(x_a), network(x_b), config).total
    (loss * world_size).backward()
    parameters.append([p.grad for p in network.parameters()])

torch.save({"embeddings": embeddings, "parameters": parameters}, folder / f"rank-{rank}.pt")
dist.destroy_process_group()
