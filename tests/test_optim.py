"""LARS is the published algorithm, resumes exactly, and obeys the gradient scaler."""

import copy

import pytest
import torch
from torch import Tensor, nn

from train.config import OptimConfig
from train.optim import build_optimizer
from train.schedule import LearningRates

CONFIG = OptimConfig(weight_decay=0.02, momentum=0.85, eta=0.003)
RATES = LearningRates(weights=0.7, biases=0.05)


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4)).double()
    nn.init.zeros_(module[3].weight)  # a norm of 0 must not be divided by
    return module


def set_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    if step == 1:
        module[0].weight.grad.zero_()


def plain_lars(p: Tensor, grad: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """One tensor, one step, as the authors' main.py has it."""
    is_weight = p.dim() != 1
    if is_weight:
        grad = grad + CONFIG.weight_decay * p
        p_norm, grad_norm = p.pow(2).sum().sqrt(), grad.pow(2).sum().sqrt()
        if p_norm > 0 and grad_norm > 0:
            grad = CONFIG.eta * p_norm / grad_norm * grad
    mu = CONFIG.momentum * mu + grad
    return p - (RATES.weights if is_weight else RATES.biases) * mu, mu


def test_several_steps_equal_the_plain_algorithm(module: nn.Module) -> None:
    optimizer = build_optimizer(module, CONFIG)
    optimizer.set_rates(RATES)
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in module.parameters()]
    for step in range(4):
        set_gradients(module, step)
        grads = [p.grad for p in module.parameters()]
        expected = [plain_lars(p, g, mu) for (p, mu), g in zip(expected, grads, strict=True)]
        optimizer.step()
    for p, (expected_p, expected_mu) in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), expected_p, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(optimizer.state[p]["mu"], expected_mu, rtol=1e-12, atol=1e-14)


def test_state_dict_carries_the_momentum(module: nn.Module) -> None:
    optimizer = build_optimizer(module, CONFIG)
    optimizer.set_rates(RATES)
    set_gradients(module, 0)
    optimizer.step()
    twin = copy.deepcopy(module)
    restored = build_optimizer(twin, OptimConfig())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, lars in ((module, optimizer), (twin, restored)):
        set_gradients(network, 2)
        lars.step()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def scaled_step(module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def test_scaled_gradients_give_the_unscaled_step(module: nn.Module) -> None:
    reference = copy.deepcopy(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))  # it sets itself up at the first loss
    scaled, plain = build_optimizer(module, CONFIG), build_optimizer(reference, CONFIG)
    for step in range(3):
        for network, lars in ((module, scaled), (reference, plain)):
            lars.set_rates(RATES)
            set_gradients(network, step)
        for parameter in module.parameters():
            parameter.grad.mul_(1024.0)
        scaled_step(module, scaled, scaler)
        plain.step()
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_non_finite_gradient_under_a_scaler_changes_nothing(module: nn.Module) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(1))
    optimizer = build_optimizer(module, CONFIG)
    optimizer.set_rates(RATES)
    set_gradients(module, 0)
    scaled_step(module, optimizer, scaler)
    before = [t.detach().clone() for p in module.parameters() for t in (p, optimizer.state[p]["mu"])]
    set_gradients(module, 2)
    module[3].bias.grad[1] = float("inf")
    scaled_step(module, optimizer, scaler)
    after = [t for p in module.parameters() for t in (p, optimizer.state[p]["mu"])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scaler.get_scale() == 0.5
