"""The learning rate follows the authors' schedule."""

import math

import pytest

from train.config import OptimConfig
from train.schedule import learning_rates


def rates_as_published(
    step: int, steps_per_epoch: int, epochs: int, batch_size: int, warmup_epochs: int
) -> tuple[float, float]:
    """Written down from the authors' main.py: 10 epochs of warm-up there, lr 0.2 and 0.0048."""
    last, warmup, base = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch, batch_size / 256
    if step < warmup:
        lr = base * step / warmup
    else:
        q = (1 + math.cos(math.pi * (step - warmup) / (last - warmup))) / 2
        lr = base * q + base * 0.001 * (1 - q)
    return lr * 0.2, lr * 0.0048


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs", "batch_size", "warmup_epochs"), [(625, 1000, 2048, 10), (7, 12, 96, 2)]
)
def test_rates_are_the_published_ones(
    steps_per_epoch: int, epochs: int, batch_size: int, warmup_epochs: int
) -> None:
    optim = OptimConfig(warmup_epochs=warmup_epochs)
    last = steps_per_epoch * epochs
    for step in [
        0,
        1,
        warmup_epochs * steps_per_epoch - 1,
        warmup_epochs * steps_per_epoch,
        last // 2,
        last - 1,
    ]:
        rates = learning_rates(
            step, optim, batch_size=batch_size, steps_per_epoch=steps_per_epoch, epochs=epochs
        )
        expected = rates_as_published(step, steps_per_epoch, epochs, batch_size, warmup_epochs)
        assert (rates.weights, rates.biases) == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_run_starts_at_the_full_rate() -> None:
    rates = learning_rates(0, OptimConfig(warmup_epochs=0), batch_size=512, steps_per_epoch=3, epochs=5)
    assert rates.weights == pytest.approx(2 * 0.2)
