"""How many answers are right.

Shape legend: M samples, C classes, k = min(5, C).
"""

import torch
from torch import Tensor

from model.collectives import sum_over_ranks
from model.errors import ModelError


def right_answers(logits_MC: Tensor, labels_M: Tensor) -> Tensor:
    """int64 (2,): samples whose class has the largest logit, and those where it is among the five largest.

    With fewer than five classes, it is among all of them. Raises `ModelError` where a logit is not finite.
    """
    if not logits_MC.isfinite().all():
        raise ModelError("The classifier's outputs are not all finite numbers; lower its learning rate.")
    best_Mk = logits_MC.topk(min(5, logits_MC.shape[1])).indices
    right_Mk = best_Mk == labels_M[:, None]
    return torch.stack([right_Mk[:, 0].sum(), right_Mk.any(dim=1).sum()])


def shares(right_2: Tensor, total: int) -> tuple[float, float]:
    """Of `total` samples on all ranks, from each rank's counts."""
    top1, top5 = (sum_over_ranks(right_2).double() / total).tolist()
    return top1, top5
