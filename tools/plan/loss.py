"""The loss in a plan of the step: its algorithm there, and what it costs (model/loss/plan.py).

Shape legend: W ranks, N pairs of the global batch, D embedding width.
"""

import math

import torch

from model.config import ModelConfig
from model.loss.plan import COLLECTIVE_SECONDS, Hardware, Plan, estimate, plan
from train.errors import ConfigError


def operand_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Of the embeddings as the loss takes them: the ablations are computed in float32."""
    is_plain = model.loss.normalise == "batch" and model.loss.temperature is None
    return dtype.itemsize if is_plain else torch.promote_types(dtype, torch.float32).itemsize


def loss_plan(model: ModelConfig, dtype: torch.dtype, N: int, W: int, hardware: Hardware) -> Plan:
    """The recipe's own algorithm, or the one that `auto` should take there. Raises `ConfigError`."""
    D = model.projector_widths[-1]
    planned = plan(N, D, W, operand_bytes(model, dtype), hardware)
    set_by_recipe = "dense" if model.loss.temperature is not None else model.loss.algorithm
    if set_by_recipe == "auto":
        return planned
    if set_by_recipe == "sharded" and D < W:
        raise ConfigError(
            f"The sharded loss gives each GPU a share of the features, but there are {D} for {W} GPUs; set "
            "model.loss.algorithm to gram."
        )
    return planned._replace(algorithm=set_by_recipe, reason="set by the recipe")


def compute_seconds(algorithm: str, N: int, D: int, W: int, e: int, hardware: Hardware) -> float:
    """The products and passes alone."""
    alone = estimate(algorithm, N, D, W, e, hardware._replace(link_bandwidth=math.inf))
    return alone.milliseconds / 1000 - _start_seconds(algorithm, N, D, W, e)


def _start_seconds(algorithm: str, N: int, D: int, W: int, e: int) -> float:
    """What its collectives cost whatever they carry, `COLLECTIVE_SECONDS` each."""
    return estimate(algorithm, N, D, W, e, Hardware(*4 * [math.inf])).milliseconds / 1000


def number_of_collectives(algorithm: str, N: int, D: int, W: int, e: int) -> int:
    return round(_start_seconds(algorithm, N, D, W, e) / COLLECTIVE_SECONDS)
