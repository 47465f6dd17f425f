"""Nearest neighbours among the images themselves: each image is a query, and never its own neighbour.

Shape legend: N images, n of them in one block, F feature width, k neighbours, C classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

MAX_SIMILARITIES = 2**26  # in memory at once, 256 MiB of float32


def nearest(features_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and numbers, both (N, k), of the k nearest others of each image, nearest first."""
    unit_NF = normalize(features_NF.float())
    similarities, indices = [], []
    for rows_n in torch.arange(len(unit_NF)).split(max(1, MAX_SIMILARITIES // len(unit_NF))):
        block_nN = unit_NF[rows_n] @ unit_NF.T
        block_nN[torch.arange(len(rows_n)), rows_n] = -torch.inf
        top = block_nN.topk(k)
        similarities.append(top.values)
        indices.append(top.indices)
    return torch.cat(similarities), torch.cat(indices)


def classify(
    similarities_Nk: Tensor, indices_Nk: Tensor, labels_N: Tensor, num_classes: int, temperature: float
) -> Tensor:
    """Class (N,), int64, with the most votes of weight exp(similarity / temperature), as in `eval.knn`.

    The images' own labels do not take part, so that this is the leave-one-out prediction.
    """
    relative_Nk = (similarities_Nk - similarities_Nk[:, :1]).double()  # no temperature overflows
    votes_NC = torch.zeros(len(indices_Nk), num_classes, dtype=torch.float64)
    votes_NC.scatter_add_(1, labels_N[indices_Nk], relative_Nk.div_(temperature).exp_())
    return votes_NC.argmax(dim=1)


def one_of_each_class(labels_N: Tensor, rows: int, seed: int) -> Tensor:
    """Numbers of up to `rows` images, drawn by `seed`, of as many different classes as there are.

    In the order of their classes where there are no more classes than rows.
    """
    random = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(len(labels_N), generator=random)
    seen: dict[int, int] = {}
    for position, label in enumerate(labels_N[order_N].tolist()):
        seen.setdefault(label, position)
    first = [order_N[position].item() for position in seen.values()][:rows]
    return torch.tensor(sorted(first, key=lambda index: int(labels_N[index])))


def worst(indices_Nk: Tensor, similarities_Nk: Tensor, labels_N: Tensor, rows: int) -> Tensor:
    """Numbers of up to `rows` images that have the most neighbours of other classes, and the nearest ones.

    Images all of whose neighbours are of their class are never among them.
    """
    others_N = (labels_N[indices_Nk] != labels_N[:, None]).double().mean(dim=1)
    order_N = torch.argsort(others_N + 1e-3 * similarities_Nk.mean(dim=1).double(), descending=True)
    return order_N[others_N[order_N] > 0][:rows]
