"""Weighted k-nearest-neighbour classifier on frozen features (Wu et al. 2018, section 3.4).

Shape legend: M test samples, m of them in one block, N training samples, F feature width, k neighbours,
C classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from eval.config import KnnConfig
from pipelines.errors import DataError

MAX_SIMILARITIES = 2**27  # in memory at once, 512 MiB of float32


def knn_accuracy(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_MF: Tensor,
    test_labels_M: Tensor,
    config: KnnConfig,
    device: torch.device | str = "cpu",
) -> float:
    """Share (0 to 1) of the test samples whose class gets the most votes.

    1. cosine similarity to every training sample
    2. the k most similar vote for their class with weight exp(similarity / temperature)
    3. the class with the largest sum wins

    Features are floating point, labels int64. Raises `DataError` for fewer than k training samples.
    """
    if config.k > len(train_NF):
        raise DataError(
            f"eval.knn.k is {config.k}, but there are only {len(train_NF)} training images; lower eval.knn.k."
        )
    train_NF = normalize(train_NF.to(device))
    num_classes = int(train_labels_N.max()) + 1
    right = 0
    for rows in torch.arange(len(test_MF)).split(max(1, MAX_SIMILARITIES // len(train_NF))):
        similarities_mN = normalize(test_MF[rows].to(device)) @ train_NF.T  # 1
        nearest_mk, indices_mk = similarities_mN.topk(config.k)  # 2
        # The votes are counted on the CPU, where the order of summation is fixed, relative to the nearest
        # neighbour's, so that no temperature overflows.
        relative_mk = (nearest_mk - nearest_mk[:, :1]).cpu().double()
        votes_mC = torch.zeros(len(rows), num_classes, dtype=torch.float64)
        votes_mC.scatter_add_(
            1, train_labels_N[indices_mk.cpu()], relative_mk.div_(config.temperature).exp_()
        )
        right += int((votes_mC.argmax(dim=1) == test_labels_M[rows]).sum())  # 3
    return right / len(test_MF)
