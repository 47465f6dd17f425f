"""Which samples make up which batch: pure arithmetic on (seed, epoch, step, rank, world_size).

The order of an epoch is a permutation that every rank computes alike. Step s trains on the permutation's
entries [s * B, (s + 1) * B) for a global batch of B, and rank r of W takes the r-th of W equal slices of
them, so the global batch of a step does not depend on the number of ranks. The last, incomplete batch of an
epoch is left out (the loss would weigh it wrongly), and the next epoch's permutation is another one.
"""

import numpy as np

from pipelines.errors import DataError
from pipelines.random_bits import philox_u32

STREAM_ORDER = 0xFFFFFFFF  # counter word that no view uses


def steps_per_epoch(num_samples: int, batch_size: int, world_size: int = 1) -> int:
    """Number of whole global batches in an epoch.

    Raises `DataError` when the batch is larger than the dataset or cannot be split evenly over the ranks.
    """
    if batch_size > num_samples:
        raise DataError(
            f"The global batch of {batch_size} is larger than the dataset of {num_samples} images; "
            f"lower train.batch_size to at most {num_samples}."
        )
    if batch_size % world_size:
        raise DataError(
            f"The global batch of {batch_size} cannot be split evenly over {world_size} processes; "
            f"make train.batch_size a multiple of {world_size}."
        )
    return num_samples // batch_size


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """int64 permutation of the samples for one epoch: their ranks under counter-based 64-bit keys."""
    words_4N = philox_u32(seed, np.arange(num_samples), epoch, STREAM_ORDER, 0).astype(np.uint64)
    return np.argsort(words_4N[0] << np.uint64(32) | words_4N[1], kind="stable")


def rank_slice(permutation: np.ndarray, step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Indices of this rank's samples of the global batch `step`, in order."""
    per_rank = batch_size // world_size
    start = step * batch_size + rank * per_rank
    return permutation[start : start + per_rank]
