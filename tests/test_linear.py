"""The linear probe: learns what is linear, nothing else, the same way each time."""

import math

import torch
from torch import Tensor

from eval.config import LinearConfig
from eval.linear import LinearResult, linear_probe

CONFIG = LinearConfig(epochs=20, batch_size=32)


def clusters(num: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features in linearly separable clusters, one per class, and the labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_classes
    return 3 * torch.eye(num_classes, 16)[labels] + 0.3 * torch.randn(num, 16, generator=random), labels


def test_separable_classes_are_learnt() -> None:
    result = linear_probe(*clusters(400, 10, seed=1), *clusters(150, 10, seed=2), CONFIG)
    assert result == LinearResult(top1=1.0, top5=1.0)


def test_random_labels_stay_near_chance() -> None:
    train, test = clusters(2000, 10, seed=1)[0], clusters(2000, 10, seed=2)[0]
    random = torch.Generator().manual_seed(3)
    train_labels, test_labels = (torch.randint(10, (2000,), generator=random) for _ in range(2))
    result = linear_probe(train, train_labels, test, test_labels, CONFIG)
    # Five standard deviations of 2,000 independent guesses: 0.034 around 0.1, 0.056 around 0.5.
    assert abs(result.top1 - 0.1) < 0.034
    assert abs(result.top5 - 0.5) < 0.056


def test_seed_fixes_the_result_and_no_other_random_state_does() -> None:
    train, train_labels = (
        torch.randn(100, 16, generator=torch.Generator().manual_seed(4)),
        torch.arange(100) % 7,
    )
    test, test_labels = (
        torch.randn(1009, 16, generator=torch.Generator().manual_seed(5)),
        torch.arange(1009) % 7,
    )

    def probe(seed: int) -> LinearResult:
        config = LinearConfig(epochs=3, batch_size=32, seed=seed)
        return linear_probe(train, train_labels, test, test_labels, config)

    before = torch.get_rng_state()
    first = probe(seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert probe(seed=0) == first
    assert {probe(seed) for seed in (1, 2, 3)} != {first}
    assert first.top5 > first.top1


def test_probe_is_gradient_descent_with_momentum_and_a_cosine() -> None:
    random = torch.Generator().manual_seed(6)
    train, labels = torch.randn(60, 16, generator=random), torch.arange(60) % 3
    test = torch.randn(2000, 16, generator=random)
    config = LinearConfig(epochs=30, batch_size=60, lr=2, weight_decay=0.05, seed=8)

    weight = 0.01 * torch.randn(3, 16, generator=torch.Generator().manual_seed(8)).double()
    bias, velocity, bias_velocity = torch.zeros(3).double(), 0.0, 0.0
    targets = torch.nn.functional.one_hot(labels, 3).double()
    for epoch in range(30):
        lr = 2 * (1 + math.cos(math.pi * epoch / 30)) / 2
        errors = (train.double() @ weight.T + bias).softmax(dim=1) - targets
        velocity = 0.9 * velocity + errors.T @ train.double() / 60 + 0.05 * weight
        bias_velocity = 0.9 * bias_velocity + errors.mean(dim=0) + 0.05 * bias
        weight, bias = weight - lr * velocity, bias - lr * bias_velocity
    predicted = (test.double() @ weight.T + bias).argmax(dim=1)

    assert linear_probe(train, labels, test, predicted, config).top1 > 0.999  # float32 may turn a tie


def test_fewer_than_five_classes_are_all_among_the_first_five() -> None:
    result = linear_probe(*clusters(60, 3, seed=1), *clusters(30, 3, seed=2), CONFIG)
    assert result == LinearResult(top1=1.0, top5=1.0)
