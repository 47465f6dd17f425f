"""A few steps under torch's profiler: which kernels take the time, and how near they come to the peaks."""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tools.bench.timing import synchronise

ROWS = 20  # the dearest kernels
CONVOLUTION, NORM, PRODUCTS = "convolution", "batch-norm and element-wise", "matrix products"
COLLECTIVES, COPIES, OTHER = "collectives", "copies", "other"
KINDS = CONVOLUTION, NORM, PRODUCTS, COLLECTIVES, COPIES, OTHER

# The first that is found anywhere in a name decides. Case counts: `Memcpy` is CUDA's, `copy_` aten's.
_PATTERNS = (
    (COLLECTIVES, r"nccl|gloo|c10d::|record_param_comms"),
    # Inductor names a kernel after all that was fused into it, were it only the bias of a convolution.
    (NORM, r"^triton_(poi|red|per|for)_|cpp_fused_"),
    (
        COPIES,
        r"Memcpy|Memset|direct_copy|FillFunctor|CatArrayBatchedCopy|nchwToNhwc|nhwcToNchw|transpose_readWrite"
        r"|convertTensor|reorder"
        r"|^aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|fill_|zero_|_foreach_copy_|_foreach_zero_)$",
    ),
    (NORM, r"batch_norm|batchnorm|BatchNorm|bn_fw|bn_bw"),
    (CONVOLUTION, r"fprop|dgrad|wgrad|implicit_gemm|winograd|im2col|col2im|convolve|flip_filter|fft2d"),
    (CONVOLUTION, r"(?<![a-zA-Z])conv(?!ert)|Conv2d|conv_depthwise"),
    (PRODUCTS, r"gemm|gemv|GEMM|nvjet|splitK|cublas|cutlass|triton_tem_|triton_mm|dot_kernel|matmul"),
    (PRODUCTS, r"^aten::(_?addmm|mm|bmm|baddbmm|addbmm|addmv|mv|dot|vdot|addr|linear|_scaled_mm)(_|$)"),
    (PRODUCTS, r"^aten::(mkldnn|mkl)_linear"),
    # The Triton kernels of model/norm, of model/loss, and of pipelines/augment.
    (
        NORM,
        r"^_(moments|merge|finish|normalise|reduce|total|gradient)_kernel"
        r"|^_(column_moments|merge_splits|inner_and_cast|terms|column_reduction|embedding_gradients)_kernel"
        r"|^(recolour|box_weights|blur_rows)_kernel",
    ),
    (NORM, r"elementwise|reduce_kernel|multi_tensor_apply|pointwise|scalePackedTensor|op_tensor"),
    (
        NORM,
        r"^aten::(_foreach_)?(add|sub|rsub|mul|div|neg|abs|sqrt|rsqrt|pow|exp|log|square|reciprocal|addcmul|addcdiv"
        r"|lerp|clamp|clamp_min|clamp_max|relu|threshold|threshold_backward|where|sum|mean|var|var_mean|std|norm"
        r"|linalg_vector_norm|sigmoid|tanh|eq|ne|lt|le|gt|ge|maximum|minimum|sign|floor|round|trunc|remainder)_?$",
    ),
)
_KIND_OF = tuple((kind, re.compile(pattern)) for kind, pattern in _PATTERNS)
_DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}  # not the ranges that annotations leave on the GPU
_NOT_READ = re.compile(r"::(copy_|fill_|zero_|normal_|uniform_|bernoulli_|random_)$")  # what they write
_TOUCHES_NOTHING = re.compile(
    r"::(_?empty|new_empty|_unsafe_view|resize_|set_|record_stream)|::_?reshape_alias$"
)


def kind_of(name: str) -> str:
    """The kind, one of `KINDS`, of a kernel on a GPU or of an operator of torch, by its name."""
    return next((kind for kind, pattern in _KIND_OF if pattern.search(name)), OTHER)


def trace_steps(
    one_step: Callable[[], None], steps: int, device: torch.device, trace: Path, peaks: dict[str, Any]
) -> dict[str, Any]:
    """Trace `steps` calls of `one_step`, warmed up before; the timeline (Chrome, Perfetto) goes to `trace`.

    1. One step has its operations and its bytes counted, operator by operator.
    2. `steps` steps are timed as they are.
    3. `steps` steps run under the profiler; `trace` must end in .gz.
    4. Each operator's counts go to the kernels that it launched, in proportion to their time.

    With several ranks all must call it. Returns "kernels" of the profile:

    shares           of each kind in the time of all kernels; on a CPU in the operators' own time. Phases and
                     other annotations are none.
    rows             the dearest kernels, {kind, name, seconds, flop, bytes, calls} of one step. Flop is None
                     for kernels of which torch counts none: it counts convolutions and products. Bytes is
                     None where torch's dispatcher does not see the operator, as with our own Triton kernels.
    flop_per_step    as `FlopCounterMode` counts; None if it saw nothing, as where a CUDA graph is replayed.
    bytes_per_step   operands of the operators that the dispatcher sees, read once, and results, written once;
                     views cost nothing. What goes through a cache twice, and work space, is not in it. None
                     if nothing was seen.
    bytes_cover      share of the kernels' time that belongs to rows whose bytes are known; bytes_per_step and
                     bandwidth_share leave out the rest.
    mfu              flop_per_step over what `peaks["flops"]` allows in the time of a step of 2.
    bandwidth_share  the same of bytes.
    """
    with FlopCounterMode(display=False) as counter, _OperatorTally() as tally:  # 1
        one_step()
    synchronise(device)
    start = time.perf_counter()  # 2
    for _ in range(steps):
        one_step()
    synchronise(device)
    step_seconds = (time.perf_counter() - start) / steps

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]  # 3
    with profile(activities=activities, record_shapes=True, with_flops=True) as profiled:
        for _ in range(steps):
            one_step()
        synchronise(device)
    profiled.export_chrome_trace(str(trace))

    kernels = _kernels(profiled.events(), tally, device.type == "cuda")  # 4
    total = sum(kernel.seconds for kernel in kernels.values())
    shares = dict.fromkeys(KINDS, 0.0)
    for name, kernel in kernels.items():
        shares[kind_of(name)] += kernel.seconds / total
    rows = [kernel.row(name, steps) for name, kernel in kernels.items()]
    rows.sort(key=lambda row: row["seconds"], reverse=True)
    known = sum(row["seconds"] for row in rows if row["bytes"] is not None)
    flop, moved = counter.get_total_flops() or None, tally.bytes or None
    return {
        "shares": shares,
        "rows": rows[:ROWS],
        "flop_per_step": flop,
        "bytes_per_step": moved,
        "bytes_cover": known * steps / total if total else None,
        "mfu": flop and flop / step_seconds / peaks["flops"],
        "bandwidth_share": moved and moved / step_seconds / peaks["bytes_per_second"],
        "trace": trace.name,
    }


@dataclass
class _Cost:
    flop: int = 0
    bytes: int = 0
    calls: int = 0


class _OperatorTally(TorchDispatchMode):
    """The operations and bytes of each operator, by its name and the shapes of its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._costs: dict[tuple, _Cost] = defaultdict(_Cost)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        cost = self._costs[_key(func._schema.name, (a.shape for a in tensors))]
        cost.calls += 1
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            cost.flop += count(*args, **kwargs, out_val=out)
        moved = _bytes_moved(func, args, kwargs, out)
        cost.bytes += moved
        self.bytes += moved
        return out

    def mean_cost(self, event: FunctionEvent) -> tuple[float, float] | None:
        """Operations and bytes of the operator with those operands; None if it was not seen."""
        cost = self._costs.get(_key(event.name, event.input_shapes))
        return cost and (cost.flop / cost.calls, cost.bytes / cost.calls)


def _key(name: str, shapes: Iterable[Iterable[int]]) -> tuple:
    # The profiler has an empty shape for all that is no tensor, and for defaults, which are not dispatched.
    return name, tuple(shape for shape in map(tuple, shapes) if shape)


def _bytes_moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name, schema = func._schema.name, func._schema
    if func.is_view or _TOUCHES_NOTHING.search(name):
        return 0
    moved = 0
    given = [*zip(schema.arguments, args, strict=False)]
    given += [(argument, kwargs[argument.name]) for argument in schema.arguments if argument.name in kwargs]
    for argument, value in given:
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not written or not (argument.kwarg_only or _NOT_READ.search(name))
        moved += (read + written) * _size(value)
    results = out if len(schema.returns) > 1 else [out]
    for result, value in zip(schema.returns, results, strict=False):
        moved += _size(value) if result.alias_info is None else 0
    return moved


def _size(value: Any) -> int:
    """Bytes of all tensors in it; of one that was expanded those that exist."""
    total = 0
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor):
            existing = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                existing *= size if stride or not size else 1
            total += existing * tensor.element_size()
    return total


@dataclass
class _Kernel:
    seconds: float = 0.0
    calls: int = 0
    known_calls: int = 0
    flop: float = 0.0
    bytes: float = 0.0

    def row(self, name: str, steps: int) -> dict[str, Any]:
        return {
            "kind": kind_of(name),
            "name": name,
            "seconds": self.seconds / steps,
            "flop": self.flop / steps or None,
            "bytes": self.bytes / steps if self.known_calls == self.calls else None,
            "calls": self.calls / steps,
        }


def _kernels(events: Iterable[FunctionEvent], tally: _OperatorTally, on_gpu: bool) -> dict[str, _Kernel]:
    found: dict[str, _Kernel] = defaultdict(_Kernel)
    roots = []
    for event in events:
        if event.device_type == DeviceType.CPU:
            roots += [event] if event.cpu_parent is None else []
            if on_gpu or event.activity_type != "cpu_op":
                continue
        elif event.activity_type not in _DEVICE_WORK:
            continue
        own = [(event.name, event.time_range.elapsed_us() / 1e6)] if on_gpu else _own_work(event)
        for name, seconds in own:
            found[name].seconds += seconds
            found[name].calls += 1
    for event, (flop, moved) in _counted(roots, tally):
        work = [piece for part in _tree(event) for piece in (_launched(part) if on_gpu else _own_work(part))]
        for name, _ in work:
            found[name].known_calls += 1
        computing = [piece for piece in work if kind_of(piece[0]) in (CONVOLUTION, PRODUCTS)]
        for name, share in _weights(computing or work):
            found[name].flop += flop * share
        for name, share in _weights(work):
            found[name].bytes += moved * share
    return found


def _counted(
    events: Iterable[FunctionEvent], tally: _OperatorTally
) -> Iterator[tuple[FunctionEvent, tuple[float, float]]]:
    """The outermost events that the tally knows: the operators below one are how it is done."""
    pending = list(events)
    while pending:
        event = pending.pop()
        cost = tally.mean_cost(event)
        if cost is None:
            pending += event.cpu_children
        else:
            yield event, cost


def _tree(event: FunctionEvent) -> Iterator[FunctionEvent]:
    pending = [event]
    while pending:
        yield (event := pending.pop())
        pending += event.cpu_children


def _own_work(event: FunctionEvent) -> list[tuple[str, float]]:
    return (
        [(event.name, max(event.self_cpu_time_total, 0.0) / 1e6)] if event.activity_type == "cpu_op" else []
    )


def _launched(event: FunctionEvent) -> list[tuple[str, float]]:
    return [(kernel.name, kernel.duration / 1e6) for kernel in event.kernels]


def _weights(work: list[tuple[str, float]]) -> list[tuple[str, float]]:
    total = sum(seconds for _, seconds in work)
    return [(name, seconds / total if total else 1 / len(work)) for name, seconds in work]
