"""The numbers of PIL's Gaussian blur: three box blurs along the rows, then three along the columns.

Each pass turns the S pixels x of a row or column, whole numbers from 0 to 255, into whole numbers again:

    near = x[i - radius] + ... + x[i + radius]
    far  = x[i - radius - 1] + x[i + radius + 1]
    x[i] = (inner * near + outer * far + 2^23) >> 24

with every index clamped to 0 .. S - 1. The sum fits 32 bits without a sign.
"""

import math
from typing import NamedTuple

from torch import Tensor


class BoxWeights(NamedTuple):
    """What a pass needs, int32. All weights together are 2^24, or 1 less."""

    radius: Tensor  # pixels on either side that weigh `inner`; the next one weighs `outer`
    inner: Tensor
    outer: Tensor


def box_weights(sigma: Tensor) -> BoxWeights:
    """For float32 sigmas in pixels, of any shape; a sigma of 0 gives the identity.

    PIL rounds every step to float32. Here each is rounded from double precision, which gives the same bits,
    and which no compiler can contract and no device divides otherwise. The numbers are the equations in
    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (SSVM 2011).
    """

    def rounded(x: Tensor) -> Tensor:
        return x.float().double()

    sigma = sigma.double()
    variance = rounded(rounded(sigma * sigma) / 3)  # of each of the three boxes
    length = rounded((12 * variance + 1).sqrt())  # [7]
    whole = ((length - 1) / 2).floor()  # [11]
    part = rounded((2 * whole + 1) * rounded(whole * (whole + 1) - rounded(3 * variance)))  # [14]
    part = rounded(part / rounded(6 * rounded(variance - (whole + 1) ** 2)))
    radius = rounded(whole + part)
    inner = rounded(2**24 / rounded(2 * radius + 1)).int()
    outer = (2**24 - (2 * radius.int() + 1) * inner) // 2
    return BoxWeights(radius.int(), inner, outer)


def box_reach(max_sigma: float) -> int:
    """Pixels on either side that the boxes of sigmas up to `max_sigma` weigh, in one pass."""
    above = max_sigma * (1 + 1e-6)  # float32 may round up to the next radius
    return math.floor((math.sqrt(4 * above**2 + 1) - 1) / 2) + 1
