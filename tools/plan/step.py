"""The time of one step of one rank, and what its collectives carry.

Shape legend: W ranks, N pairs of the global batch, n = N / W of a rank, k pieces, D embedding width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from model.loss.plan import Hardware, estimate
from tools.plan.cluster import Cluster, Operation
from tools.plan.loss import compute_seconds, loss_plan, number_of_collectives, operand_bytes
from tools.plan.rates import Rates
from tools.plan.work import NetworkWork
from train.config import RunConfig
from train.errors import ConfigError
from train.step import DTYPES

# Bytes of gradients that DistributedDataParallel sums together: the first time, and later.
BUCKETS = 1 << 20, 25 << 20
NEWS_BYTES, STATISTIC_BYTES = 4 * 8, 4  # train/preemption.py; float32 statistics
VIEWS = 2
_OPERATIONS = {"dense": "all_reduce", "gram": "all_gather", "sharded": "all_to_all, all_reduce"}
# The authors' loss makes a pass where ours fuses two, over operands as wide.
AUTHORS_PASSES = 2


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step."""

    what: str
    operation: str
    count: int
    bytes: float  # of the tensors that they carry, in all
    sent: float  # bytes that each rank sends, in all
    seconds: float
    exposed: float  # of these, seconds in which nothing else happens


@dataclass(frozen=True)
class StepCost:
    """Predicted seconds of a step of `pairs` pairs on each rank, by part."""

    pairs: int
    parts: dict[str, float]  # in the order of the step; their sum is its time, without waiting for data
    traffic: list[Traffic]
    algorithm: str
    reason: str
    authors_loss: float  # seconds of the authors' formulation there
    loss_peak_bytes: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def exposed(self) -> float:
        """Seconds in which nothing happens but communication."""
        return sum(t.exposed for t in self.traffic)


def check_batch(config: RunConfig, gpus: int) -> None:
    """Raises `ConfigError` where that many GPUs cannot share the batch."""
    N, k = config.train.batch_size, config.train.micro_batches
    if N % gpus:
        below = next(W for W in range(gpus, 0, -1) if N % W == 0)
        raise ConfigError(
            f"train.batch_size {N} cannot be split over {gpus} GPUs; take {below} GPUs, or a batch of "
            f"{gpus * max(1, round(N / gpus))}."
        )
    if N // gpus % k:
        raise ConfigError(
            f"train.micro_batches must divide the {N // gpus} pairs of each GPU, but it is {k}; change it, "
            "or the number of GPUs."
        )


def predict_step(
    config: RunConfig, cluster: Cluster, work: NetworkWork, rates: Rates, memory: float
) -> StepCost:
    """`memory`: bytes that the loss may take. Raises `ConfigError` where the batch cannot be split."""
    check_batch(config, cluster.gpus)
    model, dtype = config.model, DTYPES[config.train.precision]
    N, W, k = config.train.batch_size, cluster.gpus, config.train.micro_batches
    n, D, e = N // W, model.projector_widths[-1], operand_bytes(model, dtype)
    link = rates.link_share * cluster.slowest_link
    hardware = rates.loss_hardware._replace(link_bandwidth=link, memory=memory)

    planned = loss_plan(model, dtype, N, W, hardware)
    algorithm = planned.algorithm
    loss = rates.loss_factor * compute_seconds(algorithm, N, D, W, e, hardware)
    forward, backward = rates.forward(n / k), rates.backward(n / k)
    traffic = [
        _loss_traffic(algorithm, N, D, W, e, hardware, cluster, rates),
        *_statistics(config, work, cluster, rates, link),
        _gradients(work, cluster, rates, link, backward),
        _one("news", "all_reduce", NEWS_BYTES, 1, cluster, rates, link),
    ]
    exposed = {t.what: 0.0 for t in traffic}
    for t in traffic:
        exposed[t.what] += t.exposed
    parts = {
        "augment": rates.augment(n),
        "forward": k * forward,
        "loss": loss,
        "backward": k * backward + (k - 1) * forward,
        "optimizer": rates.optimizer,
        **{f"{what}, exchanged": seconds for what, seconds in exposed.items() if W > 1},
    }
    twice = hardware._replace(memory_bandwidth=hardware.memory_bandwidth / AUTHORS_PASSES)
    authors = rates.loss_factor * compute_seconds("dense", N, D, W, e, twice)
    authors += _loss_traffic("dense", N, D, W, e, hardware, cluster, rates).seconds
    peak = estimate(algorithm, N, D, W, e, hardware).peak_bytes
    return StepCost(n, parts, traffic if W > 1 else [], algorithm, planned.reason, authors, peak)


def _one(
    what: str, operation: Operation, size: float, count: int, cluster: Cluster, rates: Rates, link: float
) -> Traffic:
    """`count` collectives on the step's path, of `size` bytes in all."""
    sent = cluster.ring_bytes(operation, size)
    seconds = count * rates.latency_factor * cluster.latency(operation) + sent / link
    return Traffic(what, operation, count, size, sent, seconds, seconds)


def _statistics(
    config: RunConfig, work: NetworkWork, cluster: Cluster, rates: Rates, link: float
) -> Iterator[Traffic]:
    """Every synchronised norm gathers means, squares and a count going forward, and sums two rows going back.

    A piece goes forward twice but for the last one. Torch's own norms take each view by itself.
    """
    k, channels = config.train.micro_batches, sum(work.norm_channels)
    calls = len(work.norm_channels) * (VIEWS if config.model.norm == "torch" else 1)
    rows = 3 * VIEWS if config.model.norm == "torch" else 2 * VIEWS + 1
    if calls:
        size = (2 * k - 1) * rows * channels * STATISTIC_BYTES
        yield _one("statistics", "all_gather", size, (2 * k - 1) * calls, cluster, rates, link)
        size = k * 2 * VIEWS * channels * STATISTIC_BYTES
        yield _one("statistics", "all_reduce", size, k * calls, cluster, rates, link)


def _gradients(work: NetworkWork, cluster: Cluster, rates: Rates, link: float, backward: float) -> Traffic:
    """The sum of the gradients runs beside the last backward pass on GPUs; the last bucket cannot."""
    buckets = gradient_buckets(work.parameter_sizes)
    whole = _one("gradients", "all_reduce", sum(buckets), len(buckets), cluster, rates, link)
    last = _one("gradients", "all_reduce", buckets[-1], 1, cluster, rates, link).seconds
    # On the CPU the threads that send take the core's time from those that compute.
    beside = 0.0 if cluster.is_cpu else backward
    exposed = max(whole.seconds - beside, last)
    return Traffic("gradients", "all_reduce", len(buckets), whole.bytes, whole.sent, whole.seconds, exposed)


def gradient_buckets(sizes: tuple[int, ...]) -> list[int]:
    """Bytes of each bucket, in the order in which they are ready: a bucket ends when it has its size."""
    buckets = [0]
    for size in reversed(sizes):
        if buckets[-1] >= BUCKETS[min(len(buckets) - 1, 1)]:
            buckets.append(0)
        buckets[-1] += STATISTIC_BYTES * size
    return buckets


def _loss_traffic(
    algorithm: str, N: int, D: int, W: int, e: int, hardware: Hardware, cluster: Cluster, rates: Rates
) -> Traffic:
    """What the loss's plan counts; the start of each collective is the cluster's own."""
    sent = estimate(algorithm, N, D, W, e, hardware).bytes_sent
    count = number_of_collectives(algorithm, N, D, W, e)
    start = rates.latency_factor * cluster.latency("all_reduce")
    seconds = count * start + sent / hardware.link_bandwidth
    return Traffic("loss", _OPERATIONS[algorithm], count, sent, sent, seconds, seconds)
