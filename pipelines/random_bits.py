"""Philox4x32-10, a counter-based generator: the n-th number is a pure function of (key, n).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

import numpy as np
from numpy.typing import ArrayLike

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox_u32(seed: int, c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike) -> np.ndarray:
    """uint32 array of shape (4, *broadcast of the counter words): four random words for each counter.

    `seed` is the 64-bit key; the four counter words are taken modulo 2^32 and broadcast together.
    """
    counter = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) & _LOW for c in (c0, c1, c2, c3)))
    x0, x1, x2, x3 = counter
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2
        x0, x1, x2, x3 = (
            product1 >> _SHIFT ^ x1 ^ np.uint64(key0),
            product1 & _LOW,
            product0 >> _SHIFT ^ x3 ^ np.uint64(key1),
            product0 & _LOW,
        )
        key0, key1 = (key0 + _WEYL[0]) & 0xFFFFFFFF, (key1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3]).astype(np.uint32)


def uniform(words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) with 32 random bits each."""
    return words * 2.0**-32
