"""Twin batch-norm's Triton kernels compile for every GPU, as the launchers call them. Needs no GPU."""

from collections.abc import Callable

import pytest
import torch

from model.norm.options import Options, Running

triton = pytest.importorskip("triton")


@pytest.fixture
def compile_launches(
    compile_for: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., set[str]]:
    """Compile for a compute capability what a layer launches in both directions; returns the names."""

    def compile_all(shape: tuple[int, int, int], dtype: torch.dtype, form: str, capability: int) -> set[str]:
        from model.norm import kernels

        compiled = set()

        def run(
            kernel: triton.JITFunction, *args: object, grid: object, warmup: bool, **options: object
        ) -> None:
            compile_for(capability, kernel, args, options)
            compiled.add(kernel.__name__)

        monkeypatch.setattr(triton.JITFunction, "run", run)
        x_VMC, columns_4C = torch.ones(shape, dtype=dtype), torch.ones(4, shape[2])
        residual_VMC = x_VMC if form == "residual" else None
        running = Running(columns_4C[0], columns_4C[1], torch.tensor(0))
        options = Options(1e-5, 0.1, form != "plain", over_ranks=False)
        kernels.merge(kernels.moments(x_VMC))  # as between ranks
        y_VMC, statistics_KC = kernels.forward(x_VMC, residual_VMC, *columns_4C[2:], running, options)
        kernels.backward(
            *(x_VMC, x_VMC, y_VMC, *columns_4C[2:], statistics_KC, residual_VMC is not None, options)
        )
        return compiled

    return compile_all


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [70, 80, 90, 100])
def test_every_kernel_compiles(
    capability: int, dtype: torch.dtype, compile_launches: Callable[..., set[str]]
) -> None:
    from model.norm import kernels

    compiled = compile_launches((2, 256 * 49, 64), dtype, "residual", capability)
    assert compiled == {name for name in dir(kernels) if name.endswith("_kernel")}


@pytest.mark.parametrize("form", ["plain", "relu"])
@pytest.mark.parametrize("shape", [(2, 12544, 2048), (1, 17, 1), (2, 33, 507)], ids=str)
def test_kernels_compile_for_other_forms_and_widths(
    shape: tuple[int, int, int], form: str, compile_launches: Callable[..., set[str]]
) -> None:
    assert compile_launches(shape, torch.bfloat16, form, 90)
