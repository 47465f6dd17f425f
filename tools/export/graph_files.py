"""Files that hold the network as a program: ONNX, TorchScript and `torch.export`.

They take images of any number and size. Like every program they can do whatever they say when they are run:
load those alone whose source you trust.

Shape legend: N images, C colours (3), H and W pixels.
"""

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx.experimental import _config as shapes_config

from model.errors import ModelError
from model.twin_weights import TwinWeights
from tools.export.network import INPUT, OUTPUTS, build_encoder, metadata_of
from tools.export.verify import Loaded

METADATA_NAME = "metadata.json"  # of the extra file in .pt2 and TorchScript
EXAMPLE_NCHW = (2, 3, 64, 96)
PROTOBUF_BYTES = 2**31 - 2**24  # the most that a protobuf message may take, less room for the graph

Writer = Callable[[BinaryIO], None]


def prepare_torchscript(weights: TwinWeights, checkpoint: Path, out: Path) -> Writer:
    """A trace: torch calls TorchScript deprecated, but many programs load nothing else."""
    with _without_warnings():
        trace = torch.jit.trace(build_encoder(weights), torch.zeros(EXAMPLE_NCHW), check_trace=False)

    def write(file: BinaryIO) -> None:
        with _without_warnings():
            torch.jit.save(trace, file, _extra_files={METADATA_NAME: json.dumps(metadata_of(weights))})

    return write


def load_torchscript(path: Path) -> Loaded:
    with _without_warnings():
        return Loaded(torch.jit.load(path, map_location="cpu"), f"torch.jit of torch {torch.__version__}")


def prepare_exported_program(weights: TwinWeights, checkpoint: Path, out: Path) -> Writer:
    with _sizes_at_will() as dims:
        encoder, example = build_encoder(weights), (torch.zeros(EXAMPLE_NCHW),)
        program = torch.export.export(encoder, example, dynamic_shapes={INPUT: dims})
    extra = {METADATA_NAME: json.dumps(metadata_of(weights))}
    return lambda file: torch.export.save(program, file, extra_files=extra)


def load_exported_program(path: Path) -> Loaded:
    return Loaded(torch.export.load(path).module(), f"torch.export of torch {torch.__version__}")


def prepare_onnx(weights: TwinWeights, checkpoint: Path, out: Path) -> Writer:
    """Raises `ModelError` where packages for it are missing, or the network is too large for the format."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"Cannot export to {out}: that needs the Python package {' and '.join(missing)}; install "
            f"fastbarlow[onnx], or export to .pt2."
        )
    size = sum(4 * value.numel() for value in weights.state.values())
    if size > PROTOBUF_BYTES:
        raise ModelError(
            f"Cannot export to {out}: the network takes {size / 2**30:.1f} GiB, and a file of ONNX holds no "
            f"more than 2; leave out --with-projector, or export to .pt2 or .safetensors."
        )
    outputs = OUTPUTS[: 1 if weights.projector is None else 2]
    with _without_warnings(), _sizes_at_will() as dims:
        program = torch.onnx.export(
            build_encoder(weights),
            (torch.zeros(EXAMPLE_NCHW),),
            dynamo=True,
            dynamic_shapes={INPUT: dims},
            input_names=[INPUT],
            output_names=outputs,
            verbose=False,
        )
    program.model.metadata_props.update(metadata_of(weights))
    return lambda file: file.write(program.model_proto.SerializeToString())


def load_onnx(path: Path) -> Loaded:
    """By ONNX Runtime, or where that is not installed by onnx's own, slow evaluator."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        runner = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        reader = f"onnxruntime {version('onnxruntime')}"
    else:
        from onnx.reference import ReferenceEvaluator

        runner, reader = ReferenceEvaluator(str(path)), f"the reference evaluator of onnx {onnx.__version__}"

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, runner.run(None, {INPUT: images.numpy()})))

    return Loaded(run, reader)


@contextmanager
def _sizes_at_will() -> Iterator[dict[int, Dim]]:
    """Inside, graphs are captured for images of any number and size; gives their dimensions."""
    # Otherwise they hold only for sizes at which the last feature map is wider than one pixel.
    with shapes_config.patch(backed_size_oblivious=True), torch.no_grad():
        yield {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}


def _without_warnings() -> warnings.catch_warnings:
    """Of what is deprecated, or of no matter to who exports."""
    return warnings.catch_warnings(action="ignore")
