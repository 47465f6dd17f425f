"""From a checkpoint to an exported file that is known to be the same network."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from model.errors import ModelError
from model.tensor_files import read_tensor_file
from model.twin_weights import TwinWeights, read_twin_weights
from model.weights import backbone_weights
from tools.export.graph_files import (
    load_exported_program,
    load_onnx,
    load_torchscript,
    prepare_exported_program,
    prepare_onnx,
    prepare_torchscript,
)
from tools.export.network import build_encoder
from tools.export.state_files import Writer, load_tensors, prepare_pth, prepare_safetensors
from tools.export.verify import Loaded, check_same
from tools.results import file_hash
from train.files import root_cause, staged


class Format(NamedTuple):
    """How a kind of file is written and read back."""

    title: str
    prepare: Callable[[TwinWeights, Path, Path], Writer]  # weights, the checkpoint they are from, the target
    load: Callable[[Path], Loaded]


_TORCHSCRIPT = Format("TorchScript", prepare_torchscript, load_torchscript)
FORMATS = {
    ".pth": Format("PyTorch tensors", prepare_pth, load_tensors),
    ".safetensors": Format("safetensors", prepare_safetensors, load_tensors),
    ".onnx": Format("ONNX", prepare_onnx, load_onnx),
    ".ts": _TORCHSCRIPT,
    ".torchscript": _TORCHSCRIPT,
    ".pt2": Format("torch.export", prepare_exported_program, load_exported_program),
}


@dataclass(frozen=True)
class Exported:
    """A file that has been written, and what is known of it."""

    path: Path
    sha256: str
    bytes: int
    checkpoint: Path
    checkpoint_sha256: str
    weights: TwinWeights  # what the file holds; `content` is all that the checkpoint does
    difference: float  # from the checkpoint's outputs, as a share of their scale
    reader: str  # what read it back

    @property
    def format(self) -> str:
        return FORMATS[self.path.suffix].title


def export_backbone(checkpoint: Path, out: Path) -> Exported:
    """Write the backbone of `checkpoint` (or of an exported file) to `out`; the suffix says in which format.

    `out` is replaced in one atomic step, after it has been read back and compared with `checkpoint`. Raises
    `ModelError` where `checkpoint` cannot be read, `out` cannot be written, its format cannot hold the
    network, or its outputs are others.
    """
    return _export(checkpoint, out, _read_backbone)


def export_twin(checkpoint: Path, out: Path) -> Exported:
    """Write backbone and projector of `checkpoint` to `out`; the suffix says in which format.

    Raises `ModelError` as `export_backbone`, and where there is no projector.
    """
    return _export(checkpoint, out, _read_twin)


def _read_backbone(path: Path) -> TwinWeights:
    file = read_tensor_file(path)
    return TwinWeights(backbone_weights(file, path), None, None, file.content)


def _read_twin(path: Path) -> TwinWeights:
    weights = read_twin_weights(path)
    if weights.projector is None:
        raise ModelError(
            f"{path} holds a backbone alone; pass a run's checkpoint.pt, or leave out --with-projector."
        )
    return weights


def _export(checkpoint: Path, out: Path, read: Callable[[Path], TwinWeights]) -> Exported:
    """1. read  2. write beside `out`  3. read back and compare  4. rename."""
    checkpoint, out = Path(checkpoint), Path(out)
    if out.suffix not in FORMATS:
        *others, last = FORMATS
        raise ModelError(f"Cannot export to {out}: the name must end in {', '.join(others)} or {last}.")
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise ModelError(f"Cannot export {checkpoint} to itself; choose another name.")
    before = _identity(checkpoint)
    weights = read(checkpoint)  # 1
    checkpoint_sha256 = file_hash(checkpoint)
    if _identity(checkpoint) != before:
        raise ModelError(f"{checkpoint} was replaced while it was read; export again.")
    format_ = FORMATS[out.suffix]
    writer = format_.prepare(weights, checkpoint, out)
    try:
        with staged(out) as place:
            _write(writer, place, out)  # 2
            loaded = format_.load(place)  # 3
            difference = check_same(build_encoder(weights), loaded, f"Cannot export to {out}")
            sha256, size = file_hash(place), place.stat().st_size
    except OSError as error:  # 4
        raise _unwritable(out, error) from error
    return Exported(out, sha256, size, checkpoint, checkpoint_sha256, weights, difference, loaded.reader)


def _write(writer: Writer, place: Path, out: Path) -> None:
    try:
        with place.open("wb") as file:
            writer(file)
    except (OSError, RuntimeError) as error:  # torch's writers turn an OSError into a RuntimeError
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: Exception) -> ModelError:
    return ModelError(f"Cannot write {out}: {root_cause(error)}; choose a folder that exists and has room.")


def _identity(path: Path) -> tuple[int, ...] | None:
    """Of the file that has this name now; None where there is none, which reading it will tell."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
