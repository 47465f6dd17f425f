"""`fastbarlow plan`: what a recipe would do on given machines, and on any other number of their GPUs.

Shape legend: W ranks, N pairs of the global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from model.loss.hardware import NETWORK, gpu_hardware
from tools.plan.cluster import Cluster
from tools.plan.feed import Dataset, Feed, describe_dataset, describe_feed
from tools.plan.loss import loss_plan
from tools.plan.memory import Memory, free_for_loss, step_memory
from tools.plan.profiles import Measured, read_profile
from tools.plan.rates import Rates, measured_rates, published_rates
from tools.plan.step import StepCost, check_batch, predict_step
from tools.plan.work import NetworkWork, count_network
from train.config import RunConfig
from train.errors import ConfigError
from train.step import DTYPES

SCALE = tuple(2**power for power in range(11))  # 1 to 1,024 GPUs
WORTH_SAYING = 0.25  # share of a step from which on communication is what limits it
MOST_MICRO_BATCHES = 64


@dataclass(frozen=True)
class Prediction:
    """One recipe on one cluster."""

    config: RunConfig
    cluster: Cluster
    dataset: Dataset
    feed: Feed
    step: StepCost
    memory: Memory
    rates: Rates

    @property
    def data_wait(self) -> float:
        """Seconds of a step in which the GPU waits for the next batch."""
        return max(0.0, self.step.pairs / self.feed.limit - self.step.seconds)

    @property
    def seconds(self) -> float:
        return self.step.seconds + self.data_wait

    @property
    def pairs_per_second(self) -> float:
        return self.config.train.batch_size / self.seconds

    @property
    def steps(self) -> int:
        train = self.config.train
        steps = train.epochs * (self.dataset.images // train.batch_size)
        return steps if train.max_steps is None else min(steps, train.max_steps)

    @property
    def hours(self) -> float:
        return self.steps * self.seconds / 3600

    @property
    def cores(self) -> float:
        """Of the host for each GPU: those that feed it, and one that drives it."""
        return 1 + self.feed.cores(self.pairs_per_second / self.cluster.gpus)

    @cached_property
    def limit(self) -> str:
        """What more of would help first: memory, cores, workers, link, batch or GPU."""
        if not self.memory.fits:
            return "memory"
        if self.data_wait > 0:
            return self.feed.limited_by
        if self.step.exposed > WORTH_SAYING * self.seconds:
            return "link"
        return "GPU"


class Planner:
    """Counts the recipe's work once, and predicts it for any number of GPUs.

    `profiles` are files of `fastbarlow profile`. Raises `ConfigError` or `DataError` for what does not fit
    together.
    """

    def __init__(
        self,
        config: RunConfig,
        cluster: Cluster,
        *,
        cores: int | None = None,
        profiles: Sequence[Path] = (),
    ) -> None:
        _check(config, cluster, cores)
        self.config, self.cluster = config, cluster
        self.profiles: list[Measured] = [read_profile(path, config) for path in profiles]
        for measured in self.profiles:
            if measured.gpu != cluster.gpu.name:
                raise ConfigError(
                    f"The profile {measured.path} was made on {measured.gpu}, but the plan is for "
                    f"{cluster.gpu.name}; leave one of them out."
                )
        self.dataset = describe_dataset(config.data.path)
        if self.dataset.images < config.train.batch_size:
            raise ConfigError(
                f"train.batch_size {config.train.batch_size} is more than the {self.dataset.images} images "
                f"of {config.data.path}; take a smaller one."
            )
        self.feed = describe_feed(config, cores, self.profiles)
        operand_bytes = DTYPES[config.train.precision].itemsize
        self.work: NetworkWork = count_network(config.model, config.data.image_size, operand_bytes)

    def predict(self, gpus: int | None = None, micro_batches: int | None = None) -> Prediction:
        """The recipe on that many GPUs, with that setting. Raises `ConfigError` where it cannot be split."""
        cluster = self.cluster if gpus is None else self.cluster.with_gpus(gpus)
        config = (
            self.config if micro_batches is None else with_train(self.config, micro_batches=micro_batches)
        )
        check_batch(config, cluster.gpus)
        rates = published_rates(config, self.work, cluster)
        if self.profiles:
            rates = measured_rates(rates, self.profiles, cluster)
        pairs = config.train.batch_size // cluster.gpus
        free = free_for_loss(config, cluster, self.work, pairs)
        step = predict_step(config, cluster, self.work, rates, free)
        memory = step_memory(config, cluster, self.work, pairs, step.loss_peak_bytes)
        return Prediction(config, cluster, self.dataset, self.feed, step, memory, rates)

    def what_makes_it_fit(self, prediction: Prediction) -> str:
        """The setting with which a batch fits that does not."""
        pairs = prediction.step.pairs
        k = 2 * self.config.train.micro_batches
        while k <= min(pairs // 2, MOST_MICRO_BATCHES):
            if pairs % k == 0:
                found = self.predict(prediction.cluster.gpus, k)
                if found.memory.fits:
                    return f"train.micro_batches={k} makes it fit ({found.memory.peak / 1e9:.1f} GB)"
            k *= 2
        for gpus in SCALE:
            if gpus > prediction.cluster.gpus and self.config.train.batch_size % gpus == 0:
                try:
                    if self.predict(gpus).memory.fits:
                        return f"it fits on {gpus} GPUs"
                except ConfigError:
                    continue
        return "a smaller train.batch_size would fit"

    def scale(self) -> list[Prediction | str]:
        """For each of `SCALE`, the prediction or why there is none."""
        rows: list[Prediction | str] = []
        for gpus in SCALE:
            try:
                rows.append(self.predict(gpus))
            except ConfigError as error:
                rows.append(str(error))
        return rows

    def algorithm_at_hand(self, prediction: Prediction) -> str:
        """What `auto` will take there by itself: it knows the GPU, and 100 Gb/s for each between machines."""
        cluster, config = prediction.cluster, prediction.config
        if cluster.is_cpu:
            return prediction.step.algorithm
        dtype = DTYPES[config.train.precision]
        link = cluster.gpu.peer_bandwidth if cluster.machines == 1 else NETWORK
        free = free_for_loss(config, cluster, self.work, prediction.step.pairs)
        hardware = gpu_hardware(cluster.gpu, dtype.itemsize, link, free)
        N = config.train.batch_size
        return loss_plan(config.model, dtype, N, cluster.gpus, hardware).algorithm


def efficiency(prediction: Prediction, one: Prediction) -> float:
    """Pairs per second of each GPU, over those of each in `one`, which has fewer GPUs or a single one."""
    per_gpu = one.pairs_per_second / one.cluster.gpus
    return prediction.pairs_per_second / prediction.cluster.gpus / per_gpu


def _check(config: RunConfig, cluster: Cluster, cores: int | None) -> None:
    precision = config.train.precision
    if precision == "fp64":
        raise ConfigError("train.precision fp64 is for comparing runs, which nobody plans; choose another.")
    if cluster.gpu.flops(precision) is None:
        raise ConfigError(f"The {cluster.gpu.name} lacks bfloat16; set train.precision to fp16.")
    if cores is not None and cores < 1:
        raise ConfigError(f"--cores must be the cores of the host for each GPU, at least 1, not {cores}.")


def with_train(config: RunConfig, **settings: Any) -> RunConfig:
    """The recipe with other settings of its section `train`."""
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})
