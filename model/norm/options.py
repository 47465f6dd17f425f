"""What the implementations of twin batch-norm are told beside the data.

Shape legend: C channels.
"""

from typing import NamedTuple

from torch import Tensor


class Running(NamedTuple):
    """The buffers of a batch-norm layer, which its forward pass updates in place."""

    mean_C: Tensor
    var_C: Tensor
    batches: Tensor  # () int64: batches seen, each view being one


class Options(NamedTuple):
    """How to normalise."""

    eps: float
    momentum: float  # share of a new batch in the running statistics
    relu: bool  # end with max(0, .)
    over_ranks: bool  # statistics of the samples of all ranks
