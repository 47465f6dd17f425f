"""The loss's Triton kernels: as exact as the same passes in torch, complete and repeatable.

The tests marked `gpu` run on a GPU where there is one, and in Triton's interpreter in any case.
"""

import os
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.loss import torch_ops
from model.loss.products import product

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 5), (17, 127), (64, 1)]
WEIGHTS = 0.7, 0.0051
cases = pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    # Rows in many splits, and several steps in each; whole blocks of columns beside a masked one.
    + [((4500, 3), torch.float32), ((252, 507), torch.float16), ((130, 100), torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch.").replace(", ", "x").strip("()"),
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def kernels() -> ModuleType:
    """Imported late: where Triton is missing, its tests skip."""
    pytest.importorskip("triton")
    from model.loss import kernels

    return kernels


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is allocated and never written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(2).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make_views(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Correlated views, with a column of mean 1000, a constant, a tiny one, and one with an outlier first."""
    generator = torch.Generator().manual_seed(sum(shape))
    common_nD = torch.randn(shape, generator=generator)
    views = []
    for _ in range(2):
        z_nD = common_nD + 0.5 * torch.randn(shape, generator=generator)
        z_nD[:, 1:2] += 1000
        z_nD[:, 2:3] = 3.7
        z_nD[:, 3:4] *= 1e-3
        z_nD[0, 4:5] += 300
        views.append(z_nD.to(dtype).to(device))
    return views[0], views[1]


def make_products(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1 + sum(shape))
    p_a_nD, p_b_nD = torch.randn((2, *shape), generator=generator).to(device)
    return p_a_nD, p_b_nD


def double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) else value


def check(
    name: str, *args: object, scales: Callable[..., list[object]], tolerance: float = 1e-6
) -> tuple[Tensor, ...]:
    """Run kernel `name`: element by element no further from float64's result than torch, but for tolerance.

    `scales` gives for each output the magnitude, broadcast over it, that `tolerance` multiplies: that of
    the terms whose sum an element is. Returns the kernel's outputs.
    """

    def run(module: ModuleType, args: list[object]) -> tuple[Tensor, ...]:
        args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        outputs = getattr(module, name)(*args)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    actual = run(kernels(), list(args))
    in_torch = run(torch_ops, list(args))
    truth = run(torch_ops, [torch.float64 if isinstance(arg, torch.dtype) else double(arg) for arg in args])
    for x, y, true, scale in zip(actual, in_torch, truth, scales(*truth), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.isfinite().all()
        allowed = (y - true).abs() + tolerance * scale
        if INTERPRETED and x.dtype == torch.bfloat16:
            allowed += 2**-7 * true.abs()  # the interpreter cuts bits off where a GPU rounds
        assert ((x - true).abs() <= allowed).all(), ((x - true).abs() - allowed).max()
    return actual


@pytest.mark.gpu
@cases
def test_moments(
    shape: tuple[int, int], dtype: torch.dtype, kernel_device: torch.device, poisoned: None
) -> None:
    z_a_nD, z_b_nD = make_views(shape, dtype, kernel_device)

    def scales(moments_5D: Tensor) -> list[object]:
        from_first_2D = [(z_nD.double() - z_nD[0]).abs().mean(0) for z_nD in (z_a_nD, z_b_nD)]
        squares_2D = moments_5D[2:4]
        return [torch.stack([*from_first_2D, *squares_2D, squares_2D.prod(0).sqrt()])]

    (moments_5D,) = check("column_moments", z_a_nD, z_b_nD, scales=scales)
    assert (moments_5D[2:, 2:3] == 0).all()  # a constant column varies not at all


@pytest.mark.gpu
@pytest.mark.parametrize("standardise", [True, False])
@cases
def test_normalise(
    shape: tuple[int, int],
    dtype: torch.dtype,
    standardise: bool,
    kernel_device: torch.device,
    poisoned: None,
) -> None:
    views = make_views(shape, dtype, kernel_device)
    moments_5D = torch_ops.column_moments(*views)
    N = 3 * shape[0]  # this rank's third of the batch

    def scales(a_nD: Tensor, b_nD: Tensor, rstd_2D: Tensor, diagonal_D: Tensor) -> list[object]:
        return [a_nD.abs(), b_nD.abs(), rstd_2D, diagonal_D.abs()]

    check("normalise", *views, moments_5D, N, standardise, scales=scales)


@pytest.mark.gpu
@cases
def test_inner_and_cast(
    shape: tuple[int, int], dtype: torch.dtype, kernel_device: torch.device, poisoned: None
) -> None:
    views = make_views((shape[0], 4), torch.float32, torch.device("cpu"))
    k_a_nM, k_b_nM = ((z_nD @ z_nD[:301].T).to(kernel_device) for z_nD in views)

    def scales(k_a_nM: Tensor, k_b_nM: Tensor, inner: Tensor) -> list[object]:
        return [k_a_nM.abs(), k_b_nM.abs(), (k_a_nM * k_b_nM).abs().sum()]

    check("inner_and_cast", k_a_nM, k_b_nM, 1 / (500 * shape[0]), dtype, scales=scales)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [1, 5, 507, 8200])
def test_terms(D: int, kernel_device: torch.device, poisoned: None) -> None:
    diagonal_D = torch.rand(D, generator=torch.Generator().manual_seed(D)).to(kernel_device)
    squares = diagonal_D.square().sum() + D

    def scales(total: Tensor, invariance: Tensor, redundancy: Tensor, g_D: Tensor) -> list[object]:
        return [total + WEIGHTS[1] * squares, invariance, squares, g_D.abs().max()]

    check("terms", diagonal_D, squares, *WEIGHTS, scales=scales)


@pytest.mark.gpu
@cases
def test_column_reduction(
    shape: tuple[int, int], dtype: torch.dtype, kernel_device: torch.device, poisoned: None
) -> None:
    views, products = make_views(shape, dtype, kernel_device), make_products(shape, kernel_device)

    def scales(_: Tensor) -> list[object]:
        return [torch.stack([(p * x).abs().sum(0) for p, x in zip(products, views, strict=True)])]

    check("column_reduction", *products, *views, scales=scales)


@pytest.mark.gpu
@pytest.mark.parametrize("standardised", [True, False])
@cases
def test_embedding_gradients(
    shape: tuple[int, int],
    dtype: torch.dtype,
    standardised: bool,
    kernel_device: torch.device,
    poisoned: None,
) -> None:
    (a_nD, b_nD), products = make_views(shape, dtype, kernel_device), make_products(shape, kernel_device)
    columns_6D = torch.rand(6, shape[1], generator=torch.Generator().manual_seed(3)).to(kernel_device)
    reduced_2D = 50 * columns_6D[:2] if standardised else None
    rstd_2D, diagonal_D, g_D = columns_6D[2:4], columns_6D[4], -columns_6D[5]
    grad_total = torch.tensor(8.0, device=kernel_device)
    alpha, N = 0.3, 2 * shape[0] + 1

    def scales(*_: Tensor) -> list[object]:
        terms_nD = [alpha * p_nD.abs() for p_nD in products]
        scale_nD = sum(terms_nD) + (a_nD.double().abs() + b_nD.abs()) * (1 + 15 * alpha / N + 1)
        return [scale_nD * rstd_D * (grad_total / N) for rstd_D in rstd_2D]

    check(
        *("embedding_gradients", *products, a_nD, b_nD, reduced_2D, rstd_2D, diagonal_D, g_D),
        *(alpha, grad_total, N),
        scales=scales,
    )


def whole_loss(ops: ModuleType, z_a_ND: Tensor, z_b_ND: Tensor, grad_total: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of both views, for one process."""
    N = len(z_a_ND)
    a_ND, b_ND, rstd_2D, diagonal_D = ops.normalise(
        z_a_ND, z_b_ND, ops.column_moments(z_a_ND, z_b_ND), N, True
    )
    k_a_NN, k_b_NN, squares = ops.inner_and_cast(
        product(a_ND, a_ND.T), product(b_ND, b_ND.T), 1 / N, a_ND.dtype
    )
    total, _, _, g_D = ops.terms(diagonal_D, squares, *WEIGHTS)
    p_a_ND, p_b_ND = product(k_b_NN, a_ND), product(k_a_NN, b_ND)
    reduced_2D = ops.column_reduction(p_a_ND, p_b_ND, a_ND, b_ND)
    alpha = 2 * WEIGHTS[1]
    grads = ops.embedding_gradients(
        p_a_ND, p_b_ND, a_ND, b_ND, reduced_2D, rstd_2D, diagonal_D, g_D, alpha, grad_total, N
    )
    return total, *grads


def check_whole_loss(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    z_a_ND, z_b_ND = make_views(shape, dtype, device)
    grad_total = torch.tensor(4.0, device=device)
    actual = whole_loss(kernels(), z_a_ND, z_b_ND, grad_total)
    repeated = whole_loss(kernels(), z_a_ND, z_b_ND, grad_total)
    assert all(torch.equal(x, again) for x, again in zip(actual, repeated, strict=True))
    in_torch = whole_loss(torch_ops, z_a_ND, z_b_ND, grad_total)
    truth = whole_loss(torch_ops, z_a_ND.double(), z_b_ND.double(), grad_total.double())
    rounding = torch.finfo(dtype).eps if INTERPRETED and dtype == torch.bfloat16 else 0.0
    for x, y, true in zip(actual, in_torch, truth, strict=True):
        assert x.dtype == y.dtype and x.isfinite().all()
        error, error_torch = ((value - true).norm() / true.norm() for value in (x, y))
        assert error <= 1.1 * error_torch + 1e-6 + rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 127), (127, 17)])
def test_whole_loss(shape: tuple[int, int], dtype: torch.dtype, kernel_device: torch.device) -> None:
    check_whole_loss(shape, dtype, kernel_device)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 8192), (2048, 8192), (251, 16384)])
def test_whole_loss_at_full_size(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_whole_loss(shape, dtype, torch.device("cuda"))


@pytest.mark.gpu
@needs_cuda
def test_half_precision_holds_the_largest_gram_matrix() -> None:
    """One sample stands out in every feature: an element of A A^T is nearly N D, and C is all ones."""
    N, D = 64, 16384
    z_ND = torch.zeros(N, D, dtype=torch.float16, device="cuda")
    z_ND[0] = 100
    total, *grads = whole_loss(kernels(), z_ND, z_ND.clone(), torch.tensor(1.0, device="cuda"))
    expected = WEIGHTS[1] * D * (D - 1)
    assert abs(total.item() / expected - 1) < 2e-3  # four times the rounding of the operands
    assert all(grad_ND.isfinite().all() for grad_ND in grads)


@pytest.mark.gpu
@needs_cuda
def test_no_launch_waits_for_the_device() -> None:
    views = make_views((252, 508), torch.bfloat16, torch.device("cuda"))
    grad_total = torch.tensor(1.0, device="cuda")
    whole_loss(kernels(), *views, grad_total)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole_loss(kernels(), *views, grad_total)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 60e9,
    reason="needs 60 GB of device memory",
)
def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements, of which only the last rows are not 0."""
    n, D, last = 2**18 + 1, 8200, 3
    z_nD = torch.zeros(n, D, dtype=torch.float16, device="cuda")
    z_nD[-last:] = torch.randn(last, D, device="cuda")
    moments_5D = kernels().column_moments(z_nD, z_nD)
    end_nD = z_nD[-last:].double()
    sum_D, squares_D = end_nD.sum(0), end_nD.square().sum(0)
    torch.testing.assert_close(moments_5D[0].double(), sum_D / n, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(moments_5D[4].double(), squares_D - sum_D.square() / n, rtol=1e-5, atol=1e-9)
    a_nD, b_nD, rstd_2D, diagonal_D = kernels().normalise(z_nD, z_nD, moments_5D, n, True)
    expected_nD = torch_ops.normalise(z_nD[-last:], z_nD[-last:], moments_5D, n, True)[0]
    torch.testing.assert_close(a_nD[-last:], expected_nD)
    del z_nD, b_nD
    p_nD = torch.zeros(n, D, device="cuda")
    p_nD[-last:] = 1
    reduced_2D = kernels().column_reduction(p_nD, p_nD, a_nD, a_nD)
    torch.testing.assert_close(reduced_2D[1], a_nD[-last:].float().sum(0))
    columns = reduced_2D, rstd_2D, diagonal_D, diagonal_D, 0.5, torch.tensor(1e3, device="cuda"), 100
    grad_nD, _ = kernels().embedding_gradients(p_nD, p_nD, a_nD, a_nD, *columns)
    end = p_nD[-last:], p_nD[-last:], a_nD[-last:], a_nD[-last:]
    torch.testing.assert_close(grad_nD[-last:], torch_ops.embedding_gradients(*end, *columns)[0])


def test_every_kernel_in_the_interpreter(run_interpreted: Callable[[str], None]) -> None:
    pytest.importorskip("triton")
    run_interpreted(__file__)
