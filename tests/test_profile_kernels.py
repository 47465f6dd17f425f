"""The trace of a few steps: what is a kernel, of which kind, and what it costs; and the measured peaks."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from tools import figures_profile
from tools.figures import png_of
from tools.figures_profile import KIND_COLOURS, roofline_png
from tools.profile import kernels
from tools.profile.kernels import KINDS, kind_of, trace_steps
from tools.profile.peaks import measure_peaks

CPU, GPU = torch.device("cpu"), torch.device("cuda")
STEPS = 2
PEAKS = {"flops": 1e10, "bytes_per_second": 1e9, "precision": "fp32"}
NAMES = {
    "convolution": [
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4",
        "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816wgrad_optimized_f16_128x128_32x5_nhwc>",
        "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false, false, true>",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>",
        "void wgrad2d_grouped_direct_kernel<__half, float>",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float, int>",
        "void at::native::im2col_kernel<float>",
        "aten::convolution",
        "aten::conv2d",
        "aten::cudnn_convolution",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
    ],
    "batch-norm and element-wise": [
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>",
        "void cudnn::bn_bw_1C11_singleread<float, 512, true, 1, 2, 0>",
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<float>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>>",
        "triton_poi_fused_convolution_relu_3",
        "triton_red_fused_native_batch_norm_backward_12",
        "aten::native_batch_norm",
        "aten::add_",
        "aten::relu",
        "aten::_foreach_mul_",
        "aten::threshold_backward",
    ],
    "matrix products": [
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_nn",
        "sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize128x128x32_stage4_warpsize2x2x1_tensor16x8x16_kernel",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_nn_align8>",
        "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
        "triton_tem_fused_addmm_4",
        "aten::addmm",
        "aten::mm",
        "aten::mkldnn_linear",
    ],
    "collectives": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllGather_RING_LL_Sum_int8_t",
        "gloo:all_reduce",
        "c10d::allreduce_",
        "nccl:_all_gather_base",
    ],
    "copies": [
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(TensorIterator&)>",
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, unsigned int, 4, 64, 64>",
        "aten::copy_",
        "aten::_to_copy",
    ],
    "other": [
        "void at::native::(anonymous namespace)::max_pool_forward_nhwc<float, int>",
        "aten::max_pool2d_with_indices",
        "aten::empty",
        "aten::view",
        "ReluBackward0",
        "autograd::engine::evaluate_function: ConvolutionBackward0",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in NAMES for name in NAMES[kind]])
def test_kind_of_a_kernel(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def test_every_triton_kernel_of_the_project_has_a_kind() -> None:
    root = Path(__file__).parents[1]
    launched = set()
    for file in [p for folder in ("model", "pipelines") for p in (root / folder).rglob("kernels*.py")]:
        # Launched with a grid; the other functions are inlined into those.
        text = file.read_text()
        jitted = re.findall(r"@triton\.jit[^\n]*\ndef (\w+)\(", text)
        launched |= {name for name in jitted if re.search(rf"\b{name}\[", text)}
    assert len(launched) > 10
    assert {kind_of(name) for name in launched} == {"batch-norm and element-wise"}


def make_step(device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 49, 11)
    ).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    x_NCHW = torch.randn(6, 3, 7, 7, device=device)

    def step() -> None:
        with record_function("forward"):
            total = network(x_NCHW).square().mean()
        with record_function("backward"):
            total.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    step()
    return step


def trace_all(device: torch.device, folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ROWS", 1000)
        return trace_steps(make_step(device), STEPS, device, folder / "trace.json.gz", PEAKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def traced(folder: Path) -> dict[str, Any]:
    return trace_all(CPU, folder)


def test_shares_are_of_all_operators(traced: dict[str, Any]) -> None:
    assert tuple(traced["shares"]) == KINDS
    assert sum(traced["shares"].values()) == pytest.approx(1)
    seconds = sum(row["seconds"] for row in traced["rows"])
    for kind, share in traced["shares"].items():
        of_kind = sum(row["seconds"] for row in traced["rows"] if row["kind"] == kind)
        assert of_kind / seconds == pytest.approx(share)
    for kind in ("convolution", "batch-norm and element-wise", "matrix products"):
        assert traced["shares"][kind] > 0
    assert traced["shares"]["collectives"] == 0


def test_phases_are_in_the_trace_and_are_no_kernels(traced: dict[str, Any], folder: Path) -> None:
    with gzip.open(folder / traced["trace"], "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    phases = {"forward", "backward", "optimizer"}
    assert phases <= names
    assert "aten::convolution" in names
    assert not phases & {row["name"] for row in traced["rows"]}


def assert_flop_counted(traced: dict[str, Any], device: torch.device) -> None:
    step = make_step(device)
    with FlopCounterMode(display=False) as counter:
        step()
    assert traced["flop_per_step"] == counter.get_total_flops()
    by_kind = dict.fromkeys(KINDS, 0.0)
    for row in traced["rows"]:
        by_kind[row["kind"]] += row["flop"] or 0
    products = 2 * 6 * 245 * 11 * 3  # forward, and the gradients of both operands
    convolutions = 2 * 6 * 49 * 5 * 27 * 2  # the images need no gradient
    assert by_kind["matrix products"] == pytest.approx(products)
    assert by_kind["convolution"] == pytest.approx(convolutions)
    assert sum(by_kind.values()) == pytest.approx(traced["flop_per_step"])


def test_flop_reach_the_operators_that_do_them(traced: dict[str, Any]) -> None:
    assert_flop_counted(traced, CPU)


def test_bytes_are_of_operands_and_results(tmp_path: Path) -> None:
    a, b, row = torch.ones(31, 17), torch.ones(17, 5), torch.ones(1, 5)

    def step() -> None:
        c = a @ b  # reads both, writes (31, 5)
        c.add_(row.expand(31, 5))  # reads c and one row, writes c
        c.t().zero_()  # writes c
        torch.empty(1000)

    found = trace_steps(step, STEPS, CPU, tmp_path / "trace.json.gz", PEAKS)
    c = 31 * 5
    product, addition, zero = 31 * 17 + 17 * 5 + c, 2 * c + 5, c
    assert found["bytes_per_step"] == 4 * (product + addition + zero)
    of = {row["name"]: row for row in found["rows"]}
    assert of["aten::add_"]["bytes"] == 4 * addition
    assert of["aten::add_"]["calls"] == 1
    assert of["aten::add_"]["flop"] is None
    assert of["aten::mm"]["flop"] == pytest.approx(2 * 31 * 17 * 5)
    assert of["aten::empty"]["bytes"] is not None


def test_share_of_the_peaks(traced: dict[str, Any]) -> None:
    ratio = traced["mfu"] / traced["bandwidth_share"]
    intensity = traced["flop_per_step"] / traced["bytes_per_step"]
    assert ratio == pytest.approx(intensity * PEAKS["bytes_per_second"] / PEAKS["flops"])
    assert 0 < traced["bytes_cover"] <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_of_a_gpu(tmp_path: Path) -> None:
    traced = trace_all(GPU, tmp_path)
    assert sum(traced["shares"].values()) == pytest.approx(1)
    assert_flop_counted(traced, GPU)
    assert not {"forward", "backward", "optimizer"} & {row["name"] for row in traced["rows"]}
    peaks = measure_peaks(GPU, "bf16")
    assert peaks["flops"] > 0 and peaks["bytes_per_second"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_peaks_are_measured(precision: str) -> None:
    peaks = measure_peaks(CPU, precision)
    assert peaks["flops"] > 1e8
    assert peaks["bytes_per_second"] > 1e8
    assert peaks["precision"] == precision


def test_roofline_shows_kernels_with_both_counts(
    traced: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(figures_profile, "png_of", lambda figure: drawn.append(figure) or png_of(figure))
    by_kind = {kind: [row for row in traced["rows"] if row["kind"] == kind] for kind in KINDS}
    assert tuple(KIND_COLOURS) == KINDS
    assert roofline_png(by_kind, PEAKS).startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    places = sorted(tuple(place) for dots in axes.collections for place in dots.get_offsets())
    counted = [row for row in traced["rows"] if row["flop"] and row["bytes"]]
    assert len(counted) >= 3
    assert places == sorted((row["flop"] / row["bytes"], row["flop"] / row["seconds"]) for row in counted)
    (roof,) = axes.lines
    assert tuple(roof.get_xydata()[1]) == (10, 1e10)  # where both roofs meet
    bandwidth = roof.get_xydata()[0]
    assert bandwidth[1] / bandwidth[0] == pytest.approx(1e9)
