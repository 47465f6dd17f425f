"""Profiles as `fastbarlow profile` writes them, read for what a plan can use.

Shape legend: n pairs of a rank, N of the global batch, k pieces, W ranks, D embedding width.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.gpus import find_gpu
from model.loss.plan import Hardware
from tools.plan.cluster import CPU, Cluster
from tools.plan.loss import compute_seconds, operand_bytes
from train.config import RunConfig
from train.errors import ConfigError
from train.step import DTYPES

LEAST_SHARE = 0.1  # of a phase that must remain when the collectives inside it are taken out


@dataclass(frozen=True)
class Measured:
    """What one profile says of one rank; times in seconds, without waiting for data or for other ranks."""

    path: Path
    config: RunConfig
    gpu: str  # its name, or "CPU"
    pairs: int  # of a rank in a step, n
    piece: int  # of them that pass together, n / k
    ranks: int
    algorithm: str
    forward: float  # of a piece
    backward: float  # of a piece
    augment: float
    loss: float
    optimizer: float
    peaks: tuple[float, float] | None  # products per second, bytes per second
    link: float | None  # bytes per second that a rank sends in a ring, where several ranks were profiled
    latency: float | None  # seconds of a sum that carries next to nothing
    link_ranks: int  # of those two
    pairs_per_core: float | None  # that the loader alone delivers in a second of one core

    def planned_loss(self, hardware: Hardware) -> float:
        """Seconds that the plan gives the same loss, without its collectives."""
        model, N = self.config.model, self.pairs * self.ranks
        e = operand_bytes(model, DTYPES[self.config.train.precision])
        return compute_seconds(self.algorithm, N, model.projector_widths[-1], self.ranks, e, hardware)

    def linked(self, like: Cluster) -> Cluster:
        """The ranks whose collectives were measured, on machines like those."""
        return like.with_gpus(self.link_ranks)


def read_profile(path: Path, config: RunConfig) -> Measured:
    """The profile in the file `path`, if it is of the network that `config` describes.

    Raises `ConfigError` where the file is not a profile, or of another network.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The profile {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is not the JSON of a profile; give fastbarlow profile's profile.json."
        ) from error
    try:
        settings = content["settings"]
        _check(path, settings, config)
        return _measured(path, content, config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} lacks what a plan needs ({type(error).__name__}: {error}); profile the recipe again."
        ) from error


def _check(path: Path, settings: Mapping[str, Any], config: RunConfig) -> None:
    planned = {
        "backbone": config.model.backbone,
        "projector": config.model.projector,
        "image_size": config.data.image_size,
        "precision": config.train.precision,
        "norm": config.model.norm,
    }
    for name, value in planned.items():
        if str(settings[name]) != str(value):
            raise ConfigError(
                f"The profile {path} is of {name} {settings[name]}, but the recipe has {value}; profile the "
                "recipe itself."
            )


def _measured(path: Path, content: Mapping[str, Any], config: RunConfig) -> Measured:
    settings, phases = content["settings"], content["run"]["phases"]
    ranks, k = int(settings["ranks"]), int(settings["micro_batches"])
    n = int(settings["batch_size"]) // ranks
    collectives = content.get("collectives") or []
    # A benchmark of collectives may have had more ranks than the step.
    link_ranks = max([ranks, *(int(c.get("ranks", 1)) for c in collectives)])
    waits = {
        "forward": _seconds(collectives, "statistics", "all_gather"),
        "backward": _seconds(collectives, "statistics", "all_reduce"),
        "loss": _seconds(collectives, "loss"),
    }
    phases = {
        name: max(float(seconds) - waits.get(name, 0.0), LEAST_SHARE * float(seconds))
        for name, seconds in phases.items()
    }
    alone = ((content.get("ceilings") or {}).get("step") or {}).get("pairs_per_second")
    own = {name: phases.get(name, 0.0) for name in ("augment", "forward", "loss", "backward", "optimizer")}
    if min(own["forward"], own["backward"], own["optimizer"], own["loss"]) <= 0:
        raise ValueError("a phase that takes no time")
    if alone and ranks == 1:  # beside a loader at work each phase takes longer
        own = {name: seconds * n / float(alone) / sum(own.values()) for name, seconds in own.items()}
    forward = own["forward"] / k
    backward = max((own["backward"] - (k - 1) * forward) / k, LEAST_SHARE * own["backward"] / k)
    peaks = content.get("peaks")
    loader = (content.get("ceilings") or {}).get("loader") or {}
    device = str(content["environment"]["device"])
    found = find_gpu(device)
    return Measured(
        path=Path(path),
        config=config,
        gpu=CPU if device.upper().startswith(CPU) else (found.name if found else device),
        pairs=n,
        piece=n // k,
        ranks=ranks,
        algorithm=str(settings["loss_algorithm"]),
        forward=forward,
        backward=backward,
        augment=own["augment"],
        loss=own["loss"],
        optimizer=own["optimizer"],
        peaks=(float(peaks["flops"]), float(peaks["bytes_per_second"])) if peaks else None,
        link=_link(collectives, link_ranks),
        latency=_latency(collectives),
        link_ranks=link_ranks,
        pairs_per_core=(
            float(loader["pairs_per_second"]) / float(loader["cores_used"])
            if loader.get("cores_used")
            else None
        ),
    )


def _seconds(collectives: list[Mapping[str, Any]], what: str, operation: str | None = None) -> float:
    """Seconds of a step in such collectives."""
    return sum(
        float(c["count"]) * float(c["seconds"])
        for c in collectives
        if c["what"] == what and operation in (None, c["operation"])
    )


def _link(collectives: list[Mapping[str, Any]], ranks: int) -> float | None:
    """Of the largest sum of gradients: each rank sends 2 (W - 1) / W of its bytes."""
    sums = [c for c in collectives if c["what"] == "gradients" and c["operation"] == "all_reduce"]
    if not sums or ranks == 1:
        return None
    largest = max(sums, key=lambda c: c["bytes"])
    return 2 * (ranks - 1) / ranks * float(largest["bytes"]) / float(largest["seconds"])


def _latency(collectives: list[Mapping[str, Any]]) -> float | None:
    sums = [c for c in collectives if c["what"] == "statistics" and c["operation"] == "all_reduce"]
    return min((float(c["seconds"]) for c in sums), default=None)
