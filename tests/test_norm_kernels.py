"""Twin batch-norm's Triton kernels: as exact as torch's operations, complete and repeatable.

The tests marked `gpu` run on a GPU where there is one, and in Triton's interpreter in any case.
"""

import os
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

import model.norm.function
from model.norm import TwinBatchNorm, joined_views, torch_ops
from model.norm.options import Options, Running

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = ["plain", "relu", "residual"]
forms = pytest.mark.parametrize("form", FORMS)
cases = pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 7, 5), torch.float32), ((1, 65, 1), torch.float32), ((3, 2, 129), torch.bfloat16)]
    + [((2, 130, 67), dtype) for dtype in DTYPES],
    ids=lambda value: str(value).removeprefix("torch.").replace(", ", "x").strip("()"),
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def kernels() -> ModuleType:
    """Imported late: where Triton is missing, its tests skip."""
    pytest.importorskip("triton")
    from model.norm import kernels

    return kernels


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is allocated and never written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(2).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program of a reduction meets several blocks of rows."""
    monkeypatch.setattr(kernels(), "MAX_SPLITS", 3)


class Case:
    """Inputs of a layer: a constant channel, one of mean 1000, one tiny, one with an outlier."""

    def __init__(
        self, shape: tuple[int, int, int], form: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(sum(shape))
        x_VMC, residual_VMC, dy_VMC = torch.randn(3, *shape, generator=generator)
        x_VMC[-1] = 2 * x_VMC[-1] + 3
        x_VMC[:, :, 1:2] += 1000
        x_VMC[:, :, 2:3] = 3.7
        x_VMC[:, :, 3:4] *= 1e-2
        x_VMC[:, 0, 4:5] += 300
        self.weight_C, self.bias_C, mean_C, var_C = (
            (0.5 + torch.rand(4, shape[2], generator=generator)).to(device).unbind()
        )
        self.weight_C[-1] = 0
        x_VMC, residual_VMC, dy_VMC = (t.to(dtype).to(device) for t in (x_VMC, residual_VMC, dy_VMC))
        self.running = Running(mean_C, var_C, torch.tensor(7, device=device))
        self.options = Options(1e-5, 0.3, form != "plain", over_ranks=False)
        self.x_VMC, self.residual_VMC = x_VMC, residual_VMC if form == "residual" else None
        # Rounding may decide whether the gradient passes where the ReLU's input is nearly 0.
        exact = self._run_forward(torch_ops, torch.float64, relu=False)[0]
        dy_VMC[exact.abs() < 0.05] = 0
        self.dy_VMC = dy_VMC

    def _run_forward(self, module: ModuleType, dtype: torch.dtype | None, relu: bool) -> tuple:
        cast = [
            t if t is None else t.to(dtype) if dtype else t.clone()
            for t in (self.x_VMC, self.residual_VMC, self.weight_C, self.bias_C)
        ]
        running = Running(
            *(t.to(dtype) if dtype and t.is_floating_point() else t.clone() for t in self.running)
        )
        y_VMC, statistics_KC = module.forward(*cast, running, self.options._replace(relu=relu))
        return y_VMC, statistics_KC, running, cast

    def run(self, module: ModuleType, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All outputs of both passes, the inputs as they are or in `dtype`."""
        y_VMC, statistics_KC, running, (x_VMC, residual_VMC, weight_C, bias_C) = self._run_forward(
            module, dtype, self.options.relu
        )
        dy_VMC = self.dy_VMC.to(dtype) if dtype else self.dy_VMC.clone()
        gradients = module.backward(
            *(dy_VMC, x_VMC, y_VMC if self.options.relu else None, weight_C, bias_C, statistics_KC),
            *(residual_VMC is not None, self.options),
        )
        outputs = {"y": y_VMC, "statistics": statistics_KC, **running._asdict()}
        outputs |= dict(zip(("dx", "dresidual", "dweight", "dbias"), gradients, strict=True))
        return {name: output for name, output in outputs.items() if output is not None}

    def scales(self, true: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """For each output the magnitude of the terms whose sum an element is."""
        V = len(self.x_VMC)
        x_VMC, statistics_KC = self.x_VMC.double(), true["statistics"]
        mean_V1C, rstd_V1C = statistics_KC[:V, None], statistics_KC[V : 2 * V, None]
        normalised_VMC = ((x_VMC - mean_V1C) * rstd_V1C).abs()
        # The mean's own rounding, in standard deviations, moves every output.
        from_mean_V1C = mean_V1C.abs() * rstd_V1C
        g_VMC = self.dy_VMC.double().abs()
        gx_VMC = g_VMC * (normalised_VMC + from_mean_V1C)
        scale_V1C = self.weight_C.double() * rstd_V1C
        shifted_VC = x_VMC.abs().mean(1) + (x_VMC - x_VMC[:, :1]).abs().mean(1)  # by the first row
        inner_VMC = (normalised_VMC + from_mean_V1C) * gx_VMC.mean(1, keepdim=True)
        return {
            "y": true["y"].abs() + 2 * self.weight_C.double() * from_mean_V1C + self.bias_C + 1,
            "statistics": torch.cat([shifted_VC, statistics_KC[V:]]),
            "mean_C": true["mean_C"].abs() + shifted_VC.amax(0),
            "var_C": true["var_C"].abs(),
            "batches": 0.0,
            "dx": 3 * (g_VMC + g_VMC.mean(1, keepdim=True) + inner_VMC) * scale_V1C,
            "dresidual": g_VMC,
            "dweight": gx_VMC.sum((0, 1)),
            "dbias": g_VMC.sum((0, 1)),
        }


def check(case: Case, tolerance: float = 1e-6) -> None:
    """The kernels' outputs: element by element no further from float64's than torch's, but for tolerance."""
    actual, in_torch = case.run(kernels()), case.run(torch_ops)
    true = case.run(torch_ops, torch.float64)
    assert actual.keys() == in_torch.keys()
    for name, scale in case.scales(true).items():
        if name not in actual:
            continue
        x, y, exact = actual[name], in_torch[name], true[name].double()
        assert x.dtype == y.dtype and x.shape == y.shape and x.isfinite().all(), name
        allowed = (y - exact).abs() + tolerance * scale
        if x.dtype.itemsize == 2:
            # One rounding; the interpreter cuts bits off where a GPU rounds to bfloat16.
            allowed += torch.finfo(x.dtype).eps * (1 if INTERPRETED else 0.5) * exact.abs()
        assert ((x - exact).abs() <= allowed).all(), (name, ((x - exact).abs() - allowed).max())


@pytest.mark.gpu
@forms
@cases
def test_passes(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str, kernel_device: torch.device, poisoned: None
) -> None:
    check(Case(shape, form, dtype, kernel_device))


@pytest.mark.gpu
@forms
def test_passes_with_several_steps_are_exact_and_repeatable(
    form: str, kernel_device: torch.device, few_splits: None, poisoned: None
) -> None:
    case = Case((2, 500, 6), form, torch.float32, kernel_device)
    check(case)
    first, again = case.run(kernels()), case.run(kernels())
    assert all(torch.equal(again[name], output) for name, output in first.items())


@pytest.mark.gpu
def test_groups_of_unequal_size_merge_to_the_whole(kernel_device: torch.device, poisoned: None) -> None:
    """As on ranks: each has its own means, far from zero, and a constant channel stays one."""
    case = Case((2, 230, 5), "plain", torch.float32, kernel_device)
    x_VMC = case.x_VMC + 50
    parts = [x_VMC[:, start:end].contiguous() for start, end in ((0, 3), (3, 100), (100, 230))]
    moments_GKC = torch.stack([kernels().merge(kernels().moments(part_VmC)) for part_VmC in parts])
    statistics_KC = kernels().finish(moments_GKC, case.running, case.options)
    exact_VMC = x_VMC.double()
    torch.testing.assert_close(statistics_KC[:2].double(), exact_VMC.mean(1), rtol=2e-7, atol=0)
    rstd_VC = torch.rsqrt(exact_VMC.var(1, correction=0) + case.options.eps)
    torch.testing.assert_close(statistics_KC[2:4].double(), rstd_VC, rtol=1e-5, atol=0)
    assert (statistics_KC[4] == 230).all()
    assert (statistics_KC[:2, 2] == x_VMC[:, 0, 2]).all()
    merged_KC = kernels().merge(moments_GKC)
    assert torch.equal(kernels().finish(merged_KC[None], case.running, case.options)[:2], statistics_KC[:2])


@pytest.mark.gpu
@forms
def test_not_a_number_is_passed_on(form: str, kernel_device: torch.device) -> None:
    case = Case((2, 9, 3), form, torch.float32, kernel_device)
    case.x_VMC[0, 4, 1] = torch.nan
    outputs = case.run(kernels())
    assert outputs["y"].isnan().sum() == 9 and outputs["y"][0, :, 1].isnan().all()
    assert outputs["dx"][0, :, 1].isnan().all() and outputs["mean_C"][1].isnan()


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("shape", [(6, 5, 7, 3), (6, 67)], ids=str)
def test_layer_equals_torchs_passes(
    shape: tuple[int, ...], form: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.norm.function, "choose_operations", lambda *_: kernels())
    torch.manual_seed(sum(shape))
    norm = TwinBatchNorm(shape[1], relu=form != "plain")
    for parameter in (norm.weight, norm.bias):
        nn.init.uniform_(parameter, 0.5, 1.5)
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1])
    theirs.load_state_dict(norm.state_dict())
    norm, theirs = norm.to(kernel_device), theirs.to(kernel_device)
    x, residual, dy = (3 * torch.randn(3, *shape) + 1).to(kernel_device)
    results = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        if ours:
            with joined_views([norm], 2):
                y = norm(*leaves[: 2 if form == "residual" else 1])
        else:
            y = torch.cat([theirs(view) for view in leaves[0].chunk(2)])
            y = y + leaves[1] if form == "residual" else y
            y = y if form == "plain" else relu(y)
        y.backward(dy)
        results.append([y.detach(), *(t.grad for t in leaves if t.grad is not None)])
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(*results, **tolerance)
    torch.testing.assert_close(norm.state_dict(), theirs.state_dict(), **tolerance)
    gradients = [[p.grad for p in module.parameters()] for module in (norm, theirs)]
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.gpu
@needs_cuda
@forms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 16 * 112 * 112, 64), (2, 64 * 49, 2048), (2, 256, 8192)], ids=str)
def test_passes_at_full_size(shape: tuple[int, int, int], form: str, dtype: torch.dtype) -> None:
    check(Case(shape, form, dtype, torch.device("cuda")))


@pytest.mark.gpu
@needs_cuda
@forms
def test_no_launch_waits_for_the_device(form: str) -> None:
    case = Case((2, 252, 508), form, torch.bfloat16, torch.device("cuda"))
    case.run(kernels())  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(kernels())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 60e9,
    reason="needs 60 GB of device memory",
)
def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements, of which only the last rows of the last view are not 0."""
    V, M, C, last = 2, 2**24 + 1, 72, 3
    x_VMC = torch.zeros(V, M, C, dtype=torch.float16, device="cuda")
    x_VMC[-1, -last:] = torch.randn(last, C, device="cuda")
    columns_4C = torch.rand(4, C, device="cuda")
    running = Running(columns_4C[0], columns_4C[1], torch.tensor(0, device="cuda"))
    options = Options(1e-5, 0.1, relu=True, over_ranks=False)
    y_VMC, statistics_KC = kernels().forward(x_VMC, x_VMC, columns_4C[2], columns_4C[3], running, options)
    sum_C = x_VMC[-1, -last:].double().sum(0)
    torch.testing.assert_close(statistics_KC[1].double(), sum_C / M, rtol=1e-4, atol=1e-12)
    end_VMC = x_VMC[:, -last:].contiguous()
    arguments = columns_4C[2], columns_4C[3], statistics_KC
    expected_VMC = kernels().normalise(end_VMC, end_VMC, *arguments, True)
    assert torch.equal(y_VMC[:, -last:], expected_VMC)
    gradients = kernels().backward(x_VMC, x_VMC, y_VMC, *arguments, True, options)
    expected_VMC = torch.where(expected_VMC > 0, end_VMC, 0)
    assert torch.equal(gradients[1][:, -last:], expected_VMC)
    torch.testing.assert_close(gradients[3].double(), expected_VMC.double().sum((0, 1)), rtol=1e-4, atol=1e-6)


def test_every_kernel_in_the_interpreter(run_interpreted: Callable[[str], None]) -> None:
    pytest.importorskip("triton")
    run_interpreted(__file__)
