"""LARS is the published algorithm, resumes exactly, obeys the gradient scaler, and takes few launches."""

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import OptimConfig
from train.optim import ROW, Lars, build_optimizer
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


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors go through each operation together, as on a GPU."""
    monkeypatch.setattr("train.optim._split", lambda params: [params])


@pytest.fixture(params=["together", "one by one"])
def split(request: pytest.FixtureRequest) -> None:
    if request.param == "together":
        request.getfixturevalue("together")


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("rates_on_device", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_several_steps_equal_the_plain_algorithm(
    module: nn.Module, dtype: torch.dtype, rtol: float, rates_on_device: bool
) -> None:
    """Distances in float32 are relative to each tensor's norm; the plain algorithm runs in float64."""
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in module.to(dtype).double().parameters()]
    optimizer = build_optimizer(module.to(dtype), CONFIG)
    if rates_on_device:
        optimizer.keep_rates_on_device()
    optimizer.set_rates(RATES)
    for step in range(4):
        set_gradients(module, step)
        grads = [p.grad.double() for p in module.parameters()]
        expected = [plain_lars(p, g, mu) for (p, mu), g in zip(expected, grads, strict=True)]
        optimizer.step()
    for p, (expected_p, expected_mu) in zip(module.parameters(), expected, strict=True):
        for value, reference in ((p.detach(), expected_p), (optimizer.state[p]["mu"], expected_mu)):
            assert (value.double() - reference).norm() <= rtol * reference.norm()


@pytest.mark.usefixtures("split")
def test_layout_in_memory_does_not_matter(module: nn.Module) -> None:
    """Weights in channels-last format, and gradients laid out in another way than their weights."""
    other = copy.deepcopy(module).to(memory_format=torch.channels_last)
    assert other[0].weight.stride() != module[0].weight.stride()
    for network in (module, other):
        optimizer = build_optimizer(network, CONFIG)
        optimizer.set_rates(RATES)
        for step in (0, 2):
            set_gradients(network, step)
            optimizer.step()
    torch.testing.assert_close(other.state_dict(), module.state_dict(), rtol=1e-12, atol=1e-14)


class Launches(TorchDispatchMode):
    """Counts the operations that compute; refuses what reads a value on the host, or takes tensors singly.

    The joint operations do so on a GPU where the tensors of their lists differ in shape or layout.
    """

    VIEWS = ("as_strided", "unsqueeze", "select", "detach", "view", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero")
        if name.startswith(("_foreach", "_fused")):
            for tensors in zip(*(arg for arg in args if isinstance(arg, (list, tuple))), strict=True):
                first, *others = tensors
                for tensor in others:
                    assert (tensor.shape, tensor.stride(), tensor.dtype) == (
                        first.shape,
                        first.stride(),
                        first.dtype,
                    )
        if name not in self.VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def layers(count: int) -> nn.Module:
    torch.manual_seed(count)
    parts = (nn.Sequential(nn.Conv2d(3, 5 + n % 7, 3), nn.BatchNorm2d(5 + n % 7)) for n in range(count))
    return nn.Sequential(*parts).to(memory_format=torch.channels_last)


def count_launches(module: nn.Module, has_scaler: bool) -> int:
    optimizer = build_optimizer(module, CONFIG)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=has_scaler)
    scaler.scale(torch.zeros(1))
    optimizer.set_rates(RATES)
    for counter in (nullcontext(), launches := Launches()):  # the first step also makes the momenta
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        if has_scaler:
            scaler.unscale_(optimizer)
        with counter:
            scaler.step(optimizer)
        scaler.update()
    return launches.counts.total()


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("has_scaler", [False, True])
def test_number_of_launches_does_not_grow_with_the_number_of_tensors(has_scaler: bool) -> None:
    few, many = (count_launches(layers(count), has_scaler) for count in (2, 40))
    assert few == many <= 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_number_of_kernels_on_a_gpu_does_not_grow_with_the_number_of_tensors() -> None:
    kernels = []
    for count in (2, 40):
        module = layers(count).cuda()
        optimizer: Lars = build_optimizer(module, CONFIG)
        optimizer.set_rates(RATES)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        assert any("multi_tensor_apply" in name for name in names)
        kernels.append(len(names))
    assert kernels[1] <= kernels[0] + 2 <= 32  # torch stacks and reduces norms a few dozen at a time


def test_on_the_cpu_a_step_keeps_memory_for_the_largest_tensor_alone() -> None:
    module = nn.Sequential(*(nn.Linear(100, width) for width in (50, 100, 70, 90)))
    optimizer = build_optimizer(module, CONFIG)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    momenta = 4 * sum(p.numel() for p in module.parameters())
    kept = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert momenta < kept < momenta + 4 * (100 * 100 + 2 * ROW) + 4096
    assert optimizer.state_dict()["state"].keys() == set(range(8))


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


@pytest.mark.usefixtures("split")
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
