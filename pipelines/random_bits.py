"""Philox4x32-10, a counter-based generator: the n-th number is a pure function of (key, n).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

import numpy as np
from numpy.typing import ArrayLike

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

Words = np.ndarray | np.uint64  # what holds 32 random bits each


def philox_u32(seed: int, c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike) -> np.ndarray:
    """uint32 array of shape (4, *broadcast of the counter words): four random words for each counter.

    `seed` is the 64-bit key; the four counter words are taken modulo 2^32 and broadcast together.
    """
    counter = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3)))
    return np.stack(philox(np.uint64(seed), *counter)).astype(np.uint32)


def philox(seed: np.uint64, c0: Words, c1: Words, c2: Words, c3: Words) -> tuple[Words, Words, Words, Words]:
    """The generator itself, all uint64."""
    x0, x1, x2, x3 = c0 & _LOW, c1 & _LOW, c2 & _LOW, c3 & _LOW
    key0, key1 = seed & _LOW, seed >> _SHIFT
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2
        x0, x1, x2, x3 = (
            product1 >> _SHIFT ^ x1 ^ key0,
            product1 & _LOW,
            product0 >> _SHIFT ^ x3 ^ key1,
            product0 & _LOW,
        )
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return x0, x1, x2, x3


def uniform(words: Words) -> np.ndarray | float:
    """float64 in [0, 1) with 32 random bits each."""
    return words * 2.0**-32
