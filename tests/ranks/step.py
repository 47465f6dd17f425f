"""One rank of the multi-process test of the step: its rows in, gradients and buffers of each case out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model.norm import synchronise_norms
from pipelines.batch import Batch, ViewParams
from train.step import TrainStep

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
batch, step, cases = torch.load(folder / "given.pt", weights_only=False)


def rows(data_VN: torch.Tensor) -> torch.Tensor:
    return data_VN.chunk(world_size, dim=1)[rank].contiguous()


params = ViewParams(**{name: rows(data_VN) for name, data_VN in vars(batch.params).items()})
indices_n = batch.indices_N.chunk(world_size)[rank]
mine = Batch(rows(batch.views_VNHWC), params, indices_n, indices_n)
for number, (config, network) in enumerate(cases):
    network = DistributedDataParallel(
        synchronise_norms(network), forward_sync_buffers=False, gradient_as_bucket_view=True
    )
    TrainStep(config, network, steps_per_epoch=1)(mine, step)
    result = [p.grad for p in network.parameters()], list(network.buffers())
    torch.save(result, folder / f"{number}-{rank}.pt")
dist.destroy_process_group()
