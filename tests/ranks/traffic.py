"""One rank of the multi-process test of traffic: bytes sent in a known all-reduce and in each algorithm.

Arguments: folder for the results, samples of the global batch, width, floats in the all-reduce.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from model.config import LossConfig
from model.loss import ALGORITHMS, barlow_loss
from tools.bench.traffic import TrafficMeter

folder, (samples, width, floats) = Path(sys.argv[1]), map(int, sys.argv[2:])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()


def bytes_sent(call) -> int:
    call()  # connections, and what the loss asks the ranks only once
    dist.barrier()
    meter = TrafficMeter()
    call()
    return meter.bytes_sent()


def bytes_sent_by_loss(algorithm: str, dtype: torch.dtype) -> int:
    generator = torch.Generator().manual_seed(rank)
    shape = samples // world_size, width
    z_a, z_b = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return bytes_sent(lambda: barlow_loss(z_a, z_b, LossConfig(algorithm=algorithm)).total.backward())


ones = torch.ones(floats)
sent = {"nothing": bytes_sent(lambda: None), "all-reduce": bytes_sent(lambda: dist.all_reduce(ones))}
for algorithm in ALGORITHMS:
    for dtype in (torch.float32, torch.bfloat16):
        sent[f"{algorithm} {dtype.itemsize}"] = bytes_sent_by_loss(algorithm, dtype)
(folder / f"{rank}.json").write_text(json.dumps(sent))
dist.destroy_process_group()
