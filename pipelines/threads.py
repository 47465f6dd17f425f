"""torch's number of threads, kept from libraries that set it for the whole process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Restore torch's number of threads afterwards: FFCV sets it, already when it is imported."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
