"""The memory of one GPU at the step's fullest moment.

Shape legend: n pairs of a rank, k pieces, S pixels of a side, D embedding width.
"""

from dataclasses import dataclass

from tools.plan.cluster import Cluster
from tools.plan.work import NetworkWork
from train.config import RunConfig
from train.step import DTYPES

FLOAT = 4  # bytes of weights, gradients, momenta
# What lies beside torch's tensors: CUDA's context, NCCL's buffers, cuDNN's workspaces. An assumption.
RESERVED = 2e9
VIEWS, COLOURS = 2, 3


@dataclass(frozen=True)
class Memory:
    """Bytes by what they hold; not all of it is there at once."""

    parts: dict[str, float]
    limit: float

    @property
    def peak(self) -> float:
        """Gradient buckets stay; what the passes keep is gone before the optimiser needs its copy."""
        always = sum(self.parts[name] for name in ("weights", "gradients", "momenta", "batches", "reserved"))
        passing = self.parts["activations"] + self.parts["loss"] + self.parts["views of other pieces"]
        return always + max(passing, self.parts["optimizer's copy"])

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def step_memory(
    config: RunConfig, cluster: Cluster, work: NetworkWork, pairs: int, loss_peak_bytes: float
) -> Memory:
    """For `pairs` pairs on a GPU, of which one piece at a time keeps what its backward pass needs."""
    k, S = config.train.micro_batches, config.data.image_size
    e = DTYPES[config.train.precision].itemsize
    view_pixels = VIEWS * pairs * COLOURS * S * S
    embeddings = 2 * VIEWS * pairs * config.model.projector_widths[-1] * e  # and their gradients
    ahead = 1 if config.data.loader == "synthetic" else config.data.prefetch + 2
    parts = {
        "weights": FLOAT * (work.parameters + 2 * work.statistics),  # statistics are held during the step
        "gradients": FLOAT * work.parameters,
        "momenta": FLOAT * work.parameters,
        "activations": work.activation_bytes(VIEWS * pairs // k),
        "views of other pieces": view_pixels * e * (k - 1) / k,
        "loss": embeddings + loss_peak_bytes,
        "optimizer's copy": FLOAT * work.parameters,
        "batches": ahead * view_pixels,
        "reserved": 0.0 if cluster.is_cpu else RESERVED,
    }
    sharing = min(cluster.gpus, cluster.per_machine) if cluster.is_cpu else 1
    return Memory({name: float(size) for name, size in parts.items()}, cluster.gpu.memory / sharing)


def free_for_loss(config: RunConfig, cluster: Cluster, work: NetworkWork, pairs: int) -> float:
    """Bytes that are left for the loss, whose forward pass comes when everything else is there."""
    memory = step_memory(config, cluster, work, pairs, 0.0)
    return memory.limit - memory.peak
