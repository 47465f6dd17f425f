"""Matrix products with float32 sums and a float32 result, whatever the precision of the operands."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 for float64): half-precision operands are not rounded again."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
