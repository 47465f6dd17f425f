"""The learning rate of each step: linear warm-up from 0, then a cosine (paper section 2.2)."""

import math
from dataclasses import dataclass

from train.config import OptimConfig

BASE_BATCH_SIZE = 256  # the rates in the config are for a global batch of this many samples


@dataclass(frozen=True)
class LearningRates:
    """Rates of the two parameter groups of `train.optim.build_optimizer`."""

    weights: float
    biases: float


def schedule_factor(
    step: int, *, steps_per_epoch: int, epochs: int, warmup_epochs: float, final_share: float
) -> float:
    """Share of the base rate for step `step` (counted from 0), from 0 up to 1 and down to `final_share`."""
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (epochs * steps_per_epoch - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cosine + final_share * (1 - cosine)


def learning_rates(
    step: int, optim: OptimConfig, *, batch_size: int, steps_per_epoch: int, epochs: int
) -> LearningRates:
    """Rates for step `step` of a run with a global batch of `batch_size` samples."""
    factor = schedule_factor(
        step,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        warmup_epochs=optim.warmup_epochs,
        final_share=optim.final_lr_share,
    )
    scale = factor * batch_size / BASE_BATCH_SIZE
    return LearningRates(weights=scale * optim.lr_weights, biases=scale * optim.lr_biases)
