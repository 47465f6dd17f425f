"""Files of tensors, read without running any code that may be in them.

`torch.load` takes a file apart with a pickle machine, which can call any function that a file names; here it
may call only the few that make tensors (`weights_only`). A `.safetensors` file is a table of numbers.

The memory that a file asks for is bounded by its size only for `.safetensors`: a pickle made for it can have
`weights_only` fill as much as it likes, for example with a `bytearray` of a given length.
"""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import ModelError


class UnsafeFileError(ValueError):
    """The file names objects other than tensors and plain data; to make them could run any code."""


class TensorFile(NamedTuple):
    """What a file holds."""

    content: Any  # as it was saved; for .safetensors a dict of tensors
    metadata: dict[str, str]  # empty except for .safetensors


def read_tensor_file(path: Path) -> TensorFile:
    """The content of a `.safetensors` file or of one that `torch.save` wrote, on the CPU.

    Raises `ModelError` where the file is missing, damaged, of another kind, or would run code.
    """
    try:
        if path.suffix != ".safetensors":
            return TensorFile(load_intact(path), {})
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return TensorFile(tensors, file.metadata() or {})
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
        raise ModelError(
            f"Cannot read the weights {path}: {reason}; pass a checkpoint.pt or an exported file."
        ) from error
    except UnsafeFileError as error:
        raise ModelError(
            f"{path} names more than tensors and plain data, which could run code, and is not read; pass a "
            f"file that holds nothing but weights."
        ) from error
    except (SafetensorError, ValueError) as error:
        raise damaged(path) from error


def load_intact(path: Path, map_location: torch.device | str = "cpu") -> Any:
    """What `torch.save` wrote to `path`, its checksums compared, which `torch.load` itself does not.

    Files of before torch 1.6 have none. Raises `OSError` where the file cannot be read, `UnsafeFileError`
    where it would run code, and `ValueError` where it is damaged or of another kind.
    """
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    try:
        if is_archive:
            _check_archive(path)
        with warnings.catch_warnings():  # about pickles of other versions; they load or they do not
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # damaged bytes make the reader fail in a dozen different ways
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL " in str(error):
            raise UnsafeFileError(f"{path}: {error}") from error
        raise ValueError(f"{path}: {error}") from error


def is_plain(value: object) -> bool:
    """Whether `value` is a tensor of numbers on the CPU: neither sparse nor quantised nor without content."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def damaged(path: Path) -> ModelError:
    return ModelError(
        f"{path} is damaged, cut short or no file of weights; pass a checkpoint.pt or an exported file."
    )


def _check_archive(path: Path) -> None:
    """Raise `ValueError` unless all of the archive is as `torch.save` stores it, uncompressed and intact.

    So no part of it can swell when it is read.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its parts overlap")
        if (name := archive.testzip()) is not None:
            raise ValueError(f"{name} does not have its checksum")
