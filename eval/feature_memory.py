"""Room for features: memory, or a file where they are too many.

Shape legend: N samples, F feature width.
"""

import os
import tempfile

import torch
from torch import Tensor

from pipelines.errors import DataError

MAPPED_FROM_BYTES = 2**32  # ImageNet's 1.28 million x 2048 take 9.8 GiB


def allocate_features(rows: int, width: int) -> Tensor:
    """Features (N, F), float32, not initialised.

    From `MAPPED_FROM_BYTES` on they lie in a temporary file (in TMPDIR) that is mapped into memory: the
    system keeps as much of it there as there is room. It has no name, and goes with the tensor, however the
    process ends. Raises `DataError` where the disk has no room for it.
    """
    num_bytes = 4 * rows * width
    if num_bytes < MAPPED_FROM_BYTES:
        return torch.empty(rows, width)
    with tempfile.NamedTemporaryFile(prefix="fastbarlow-features-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # else a full disk would kill the process
        except OSError as error:
            raise DataError(
                f"The folder {tempfile.gettempdir()} has no room for {num_bytes / 2**30:.1f} GiB of features "
                f"({error.strerror}); free some, or name another folder in TMPDIR."
            ) from error
        return torch.from_file(file.name, shared=True, size=rows * width).view(rows, width)
