"""The Triton kernels of the distortions compile for every GPU, as they are launched. Needs no GPU."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.config import BOUNDS, AugmentConfig, ViewConfig
from pipelines.draw import draw_views

triton = pytest.importorskip("triton")

TYPES = {torch.uint8: "u8", torch.bool: "i1", torch.int32: "i32", torch.float32: "fp32"}
TYPES |= {torch.float16: "fp16", torch.bfloat16: "bf16"}


def compile_for(capability: int, kernel: triton.JITFunction, args: tuple, options: dict) -> bytes:
    """Compile one launch, with what Triton learns from its arguments: types, constants, alignment."""
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if place >= len(args):
            signature[name], constants[(place,)] = "constexpr", options.pop(name)
        elif isinstance(args[place], Tensor):
            signature[name] = "*" + TYPES[args[place].dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = ("fp32",) * 3 if isinstance(args[place], tuple) else "i32"
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm["cubin"]


def resources(cubin: Path) -> str:
    """Registers and bytes of memory that a compiled kernel needs, as CUDA's tool tells them."""
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("dtype", "max_sigma"),
    [
        (torch.float32, 2.0),
        (torch.float16, 2.0),
        (torch.bfloat16, 2.0),
        (torch.float32, BOUNDS["blur_sigma"][1]),
    ],
)
@pytest.mark.parametrize("capability", [70, 80, 90, 100])
def test_every_kernel_compiles_and_fits_the_registers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, dtype: torch.dtype, max_sigma: float
) -> None:
    from pipelines.augment import fused, kernels_blur, kernels_colour

    compiled = {}

    def run(kernel: triton.JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        cubin = tmp_path / f"{len(compiled)}.cubin"
        cubin.write_bytes(compile_for(capability, kernel, args, options))
        compiled[cubin] = kernel.__name__
        report = resources(cubin)
        assert "STACK:0 " in report and "LOCAL:0 " in report, report

    monkeypatch.setattr(triton.JITFunction, "run", run)
    view = ViewConfig(blur_sigma=(0.1, max_sigma))
    config = AugmentConfig(view_a=view, view_b=view)
    params = draw_views(config.views, 0, 0, *[torch.arange(1, 18).numpy()] * 3)
    fused.distort(torch.zeros(2, 17, 37, 37, 3, dtype=torch.uint8), params, config, dtype)
    names = {name for kernels in (kernels_blur, kernels_colour) for name in dir(kernels)}
    assert set(compiled.values()) == {name for name in names if name.endswith("_kernel")}
    assert len(compiled) == 4  # the blur's two directions
