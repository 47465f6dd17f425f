"""`fastbarlow bench loss`: forward and backward of every algorithm of the loss, side by side.

Shape legend: N samples of the batch, D embedding width.
"""

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model.config import LossConfig
from model.loss import ALGORITHMS, barlow_loss
from model.loss.plan import choose_algorithm
from tools.bench.timing import synchronise
from tools.environment import describe_environment


def bench_loss(samples: int, width: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each algorithm on random embeddings (samples, width), float32, after one warm-up round.

    The algorithms take turns, so that a slow moment of the machine hits all of them.
    """
    generator = torch.Generator(device).manual_seed(0)
    z_a_ND, z_b_ND = (
        torch.randn(samples, width, device=device, generator=generator, requires_grad=True) for _ in range(2)
    )
    rounds = [
        {name: _time_once(name, z_a_ND, z_b_ND, device) for name in ALGORITHMS} for _ in range(1 + repeats)
    ]
    seconds = {name: [measured[name] for measured in rounds[1:]] for name in ALGORITHMS}
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "bench": "loss",
        "samples": samples,
        "width": width,
        "repeats": repeats,
        "median_seconds": medians,
        "dense_over_gram": medians["dense"] / medians["gram"],
        "chosen": choose_algorithm(samples, width),
        "seconds": seconds,
        "environment": describe_environment(device),
    }


def _time_once(algorithm: str, z_a_ND: Tensor, z_b_ND: Tensor, device: torch.device) -> float:
    z_a_ND.grad = z_b_ND.grad = None
    synchronise(device)
    start = time.perf_counter()
    barlow_loss(z_a_ND, z_b_ND, LossConfig(algorithm=algorithm)).total.backward()
    synchronise(device)
    return time.perf_counter() - start
