"""How fast one rank's device does each part of a step: by published figures, or as a profile has measured.

Shape legend: n pairs of a rank, of one of k pieces; W ranks; N pairs of the global batch; D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from model.loss.hardware import CPU_THREAD, REACHED, gpu_hardware
from model.loss.plan import Hardware
from tools.plan.cluster import Cluster
from tools.plan.profiles import Measured
from tools.plan.work import QUEUE_SECONDS, NetworkWork
from train.config import RunConfig
from train.step import DTYPES

# Passes over all parameters in float32 that LARS makes on a GPU (train/optim.py): the norms of the gradients;
# their copy; weight decay; two norms; the factor; weights, updates and momenta in and out.
LARS_PASSES = 1 + 2 + 3 + 2 + 2 + 5
# Bytes moved for each pixel of a view (pipelines/augment/fused.py), with 2-byte results.
FLOOR_BYTES, BLURRED_BYTES = 9, 21
DISTORTED_PER_CORE = 1589  # pairs of 224 pixels per second: tools/bench/results/2026-11-20-cpu.md


@dataclass(frozen=True)
class Rates:
    """What one rank needs for each part, other ranks not counted; times in seconds."""

    forward: Callable[[float], float]  # of that many pairs in one piece
    backward: Callable[[float], float]
    augment: Callable[[float], float]
    optimizer: float
    loss_hardware: Hardware  # without a link
    loss_factor: float = 1.0  # measured over planned
    link_share: float = REACHED  # of the slowest link that collectives reach
    latency_factor: float = 1.0  # measured over the model's
    sources: dict[str, str] = field(default_factory=dict)  # by part: where its figures come from


def published_rates(config: RunConfig, work: NetworkWork, cluster: Cluster) -> Rates:
    """By NVIDIA's data sheets and the share of them that is usually reached."""
    gpu, S = cluster.gpu, config.data.image_size
    operand_bytes = DTYPES[config.train.precision].itemsize
    hardware = gpu_hardware(gpu, operand_bytes, cluster.slowest_link, gpu.memory)
    flops, bandwidth = hardware.flops, hardware.memory_bandwidth
    blurred = fmean(view.blur_p for view in config.data.augment.views)
    pixel_bytes = FLOOR_BYTES + (BLURRED_BYTES - FLOOR_BYTES) * blurred
    if cluster.is_cpu:
        sheet = (
            f"{CPU_THREAD[0] / 1e9:g} GFLOP/s, {CPU_THREAD[1] / 1e9:g} GB/s a thread: model/loss/hardware.py"
        )
        pair_seconds = (S / 224) ** 2 / DISTORTED_PER_CORE
    else:
        peak = gpu.half_flops if operand_bytes == 2 else gpu.single_flops
        sheet = (
            f"{REACHED:g} of the published {peak / 1e12:g} TFLOP/s and {gpu.memory_bandwidth / 1e12:g} TB/s, "
            f"at least {1e6 * QUEUE_SECONDS:g} us for each operator"
        )
        pair_seconds = 2 * S * S * pixel_bytes / bandwidth
    link = f"{REACHED:g} of {cluster.slowest_link / 1e9:g} GB/s"
    return Rates(
        forward=lambda n: work.forward.seconds(2 * n, flops, bandwidth),
        backward=lambda n: work.backward.seconds(2 * n, flops, bandwidth),
        augment=lambda n: n * pair_seconds,
        optimizer=LARS_PASSES * 4 * work.parameters / bandwidth,
        loss_hardware=hardware,
        sources={
            "augment": "tools/bench/results/2026-11-20-cpu.md" if cluster.is_cpu else "bytes over bandwidth",
            "forward": sheet,
            "backward": sheet,
            "loss": "model/loss/plan.py at these speeds",
            "statistics": link if cluster.is_cpu else f"NCCL's own latencies, {link}",
            "gradients": link,
            "optimizer": f"{LARS_PASSES} passes over the parameters",
        },
    )


def measured_rates(published: Rates, profiles: list[Measured], cluster: Cluster) -> Rates:
    """As one or more profiles of the recipe have it.

    With one, times follow the published model's, scaled to what was measured; with several batch sizes, a
    straight line through them. Links are taken from a profile with several ranks.
    """
    names = " and ".join(str(profile.path) for profile in profiles)
    rates = replace(
        published,
        forward=_scaled(published.forward, [(m.piece, m.forward) for m in profiles]),
        backward=_scaled(published.backward, [(m.piece, m.backward) for m in profiles]),
        augment=_scaled(published.augment, [(m.pairs, m.augment) for m in profiles]),
        optimizer=fmean(m.optimizer for m in profiles),
        sources=published.sources
        | dict.fromkeys(("augment", "forward", "backward", "optimizer", "loss"), names),
    )
    peaks = next((m.peaks for m in profiles if m.peaks is not None), None)
    if peaks is not None:
        flops, bandwidth = peaks
        rates = replace(
            rates, loss_hardware=rates.loss_hardware._replace(flops=flops, memory_bandwidth=bandwidth)
        )
    planned = [m.planned_loss(rates.loss_hardware) for m in profiles]
    rates = replace(rates, loss_factor=sum(m.loss for m in profiles) / sum(planned))
    for measured in profiles:
        if measured.link is None:
            continue
        there = measured.linked(cluster)
        if (there.machines > 1) != (cluster.machines > 1):  # NVLink says nothing of a network
            continue
        rates = replace(
            rates,
            link_share=measured.link / there.slowest_link,
            latency_factor=measured.latency / there.latency("all_reduce") if measured.latency else 1.0,
            sources=rates.sources | dict.fromkeys(("statistics", "gradients"), str(measured.path)),
        )
    return rates


def _scaled(model: Callable[[float], float], points: list[tuple[float, float]]) -> Callable[[float], float]:
    """The measured (pairs, seconds), carried over to other numbers of pairs."""
    sizes, seconds = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if len(set(sizes)) == 1:
        factor = seconds.mean() / model(float(sizes[0]))
        return lambda n: factor * model(n)
    slope, start = np.polyfit(sizes, seconds, 1, w=1 / seconds)  # relative errors count alike
    if start < 0 or slope <= 0:  # noise: a step of nothing takes no less than nothing
        factor = float(np.mean(seconds / np.array([model(float(size)) for size in sizes])))
        return lambda n: factor * model(n)
    return lambda n: float(start + slope * n)
