"""Which samples make up which batch: pure arithmetic on (seed, epoch, step, rank, world_size).

The order of an epoch is a permutation that every rank computes alike. Step s trains on the permutation's
entries [s * B, (s + 1) * B) for a global batch of B, and rank r of W takes the r-th of W equal slices of
them, so the global batch of a step does not depend on the number of ranks. The last, incomplete batch of an
epoch is left out (the loss would weigh it wrongly), and the next epoch's permutation is another one.

Shape legend: N samples, G groups of consecutive samples.
"""

import numpy as np

from pipelines.errors import DataError
from pipelines.random_bits import philox_u32

STREAM_ORDER = 0xFFFFFFFF  # counter word that no view uses
# Groups that are shuffled together where the storage reads by groups. Shards hold 4 MiB in a group, so the
# system has to keep 1 GiB of each of two windows; and a batch mixes the classes of up to 256 places, which
# matters where the shards are sorted by class.
WINDOW = 256


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


def epoch_permutation(
    num_samples: int, seed: int, epoch: int, group_sizes_G: np.ndarray | None = None
) -> np.ndarray:
    """int64 permutation of the samples for one epoch: their ranks under counter-based 64-bit keys.

    With `group_sizes_G`, int64 and adding up to `num_samples`, for storage that reads consecutive samples
    together: the groups are permuted and taken `WINDOW` at a time, and each window's samples are permuted.
    A dataset of one window gets the same permutation as without groups.
    """
    key_N = _keys(num_samples, seed, epoch, 0)
    if group_sizes_G is None:
        return np.argsort(key_N, kind="stable")
    window_G = np.empty(len(group_sizes_G), np.int64)
    window_G[np.argsort(_keys(len(window_G), seed, epoch, 1), kind="stable")] = (
        np.arange(len(window_G)) // WINDOW
    )
    return np.lexsort((key_N, np.repeat(window_G, group_sizes_G)))


def samples_ahead(group_sizes_G: np.ndarray) -> int:
    """How far ahead of training storage should read: about a window's samples."""
    return int(WINDOW * group_sizes_G.mean())


def rank_slice(permutation: np.ndarray, step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Indices of this rank's samples of the global batch `step`, in order."""
    per_rank = batch_size // world_size
    start = step * batch_size + rank * per_rank
    return permutation[start : start + per_rank]


def _keys(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """uint64 random keys of 0 .. `count` - 1."""
    words_4N = philox_u32(seed, np.arange(count), epoch, STREAM_ORDER, purpose).astype(np.uint64)
    return words_4N[0] << np.uint64(32) | words_4N[1]
