"""Weighted k-nearest-neighbour classifier on frozen features (Wu et al. 2018, section 3.4).

Shape legend: M test samples, m of them in one block, N training samples, F feature width, k neighbours,
C classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eval.config import KnnConfig
from eval.neighbours import nearest_neighbours
from model.collectives import column_range as share_range
from model.collectives import sum_over_ranks
from pipelines.errors import DataError

MAX_VOTES = 2**25  # in memory at once, 256 MiB of float64


def knn_accuracy(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_MF: Tensor,
    test_labels_M: Tensor,
    config: KnnConfig,
    device: torch.device | str = "cpu",
) -> float:
    """Share (0 to 1) of the test samples whose class gets the most votes of `config.k` neighbours.

    Of this process alone; see `knn_accuracies`.
    """
    features = train_NF, train_labels_N, test_MF, test_labels_M
    return knn_accuracies(*features, [config.k], config.temperature, device)[config.k]


def knn_accuracies(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_MF: Tensor,
    test_labels_M: Tensor,
    ks: Sequence[int],
    temperature: float,
    device: torch.device | str = "cpu",
    *,
    over_ranks: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, float]:
    """Share (0 to 1) of the test samples whose class gets the most votes, for each number of neighbours.

    1. the k most similar training samples by cosine similarity, once for the largest k; see
       `nearest_neighbours` for precision, ties and memory
    2. each votes for its class with weight exp(similarity / temperature)
    3. the class with the largest sum wins; of equal ones the first

    Features are floating point, labels int64. With `over_ranks` every rank must call it with the same
    features; each takes its share of the test samples, and all get the whole's result. `progress` counts
    similarities. Raises `DataError` for fewer than k training samples.
    """
    if max(ks) > len(train_NF):
        raise DataError(
            f"eval.knn.k is {max(ks)}, but there are only {len(train_NF)} training images; lower eval.knn.k."
        )
    total = len(test_MF)
    mine = share_range(total) if over_ranks else slice(0, total)
    test_MF, test_labels_M = test_MF[mine], test_labels_M[mine]
    similarities_Mk, indices_Mk = nearest_neighbours(train_NF, test_MF, max(ks), device, progress)  # 1
    num_classes = int(train_labels_N.max()) + 1
    right_K = torch.zeros(len(ks), dtype=torch.int64)
    for rows in torch.arange(len(test_MF)).split(max(1, MAX_VOTES // num_classes)):
        # On the CPU, where the order of summation is fixed, and relative to the nearest neighbour's, so that
        # no temperature overflows.
        nearest_mk = similarities_Mk[rows].double()
        weights_mk = (nearest_mk - nearest_mk[:, :1]).div_(temperature).exp_()  # 2
        classes_mk = train_labels_N[indices_Mk[rows]]
        for place, k in enumerate(ks):
            votes_mC = torch.zeros(len(rows), num_classes, dtype=torch.float64)
            votes_mC.scatter_add_(1, classes_mk[:, :k], weights_mk[:, :k])
            right_K[place] += (votes_mC.argmax(dim=1) == test_labels_M[rows]).sum()  # 3
    if over_ranks:
        right_K = sum_over_ranks(right_K.to(device)).cpu()
    return {k: int(right) / total for k, right in zip(ks, right_K, strict=True)}
