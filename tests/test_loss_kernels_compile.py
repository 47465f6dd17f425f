"""The loss's Triton kernels compile for every GPU, as the launchers call them. Needs no GPU."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

triton = pytest.importorskip("triton")

Launch = Callable[[ModuleType, int, int, torch.dtype], None]


@pytest.fixture
def compile_launches(
    compile_for: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Launch, int, int, torch.dtype, int], set]:
    """Compile for a compute capability what `launch(kernels, n, D, dtype)` launches; returns the names."""

    def compile_all(launch: Launch, n: int, D: int, dtype: torch.dtype, capability: int) -> set[str]:
        from model.loss import kernels

        compiled = set()

        def run(
            kernel: triton.JITFunction, *args: object, grid: object, warmup: bool, **options: object
        ) -> None:
            compile_for(capability, kernel, args, options)
            compiled.add(kernel.__name__)

        monkeypatch.setattr(triton.JITFunction, "run", run)
        launch(kernels, n, D, dtype)
        return compiled

    return compile_all


def launch_all(kernels: ModuleType, n: int, D: int, dtype: torch.dtype) -> None:
    z_nD, k_nn, p_nD = torch.ones(n, D, dtype=dtype), torch.ones(n, n), torch.ones(n, D)
    columns_4D, one = torch.ones(4, D), torch.tensor(1.0)
    kernels.normalise(z_nD, z_nD, kernels.column_moments(z_nD, z_nD), n, True)
    kernels.inner_and_cast(k_nn, k_nn, 0.5, dtype)
    kernels.terms(columns_4D[0], one, 1.0, 0.5)
    reduced_2D = kernels.column_reduction(p_nD, p_nD, z_nD, z_nD)
    columns = reduced_2D, columns_4D[:2], *columns_4D[2:], 0.5, one, n
    kernels.embedding_gradients(p_nD, p_nD, z_nD, z_nD, *columns)


def launch_centred(kernels: ModuleType, n: int, D: int, dtype: torch.dtype) -> None:
    """The variants for views that are only centred."""
    z_nD, p_nD, columns_4D = torch.ones(n, D, dtype=dtype), torch.ones(n, D), torch.ones(4, D)
    kernels.normalise(z_nD, z_nD, torch.ones(5, D).double(), n, False)
    columns = None, columns_4D[:2], *columns_4D[2:], 0.5, torch.tensor(1.0), n
    kernels.embedding_gradients(p_nD, p_nD, z_nD, z_nD, *columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [70, 80, 90, 100])
def test_every_kernel_compiles(
    capability: int, dtype: torch.dtype, compile_launches: Callable[..., set[str]]
) -> None:
    from model.loss import kernels

    compiled = compile_launches(launch_all, 252, 512, dtype, capability)
    assert compiled == {name for name in dir(kernels) if name.endswith("_kernel")}


@pytest.mark.parametrize("launch", [launch_all, launch_centred])
@pytest.mark.parametrize("D", [507, 1])
def test_kernels_compile_for_odd_widths(
    launch: Launch, D: int, compile_launches: Callable[..., set[str]]
) -> None:
    assert compile_launches(launch, 17, D, torch.bfloat16, 90)
