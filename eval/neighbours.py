"""Exact nearest neighbours by cosine similarity, of any number of queries among any number of samples.

Shape legend: N samples of the bank, n of them in a block, M queries, m of them in a block, F feature width,
k neighbours.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

MAX_SIMILARITIES = 2**26  # of one block, 256 MiB of float32
MAX_VALUES = 2**25  # features of one block, 128 MiB of float32


def nearest_neighbours(
    bank_NF: Tensor,
    queries_MF: Tensor,
    k: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Similarities (M, k), float32, and positions in the bank (M, k), int64, nearest first, on the CPU.

    Of equally similar samples the one with the lower position is the nearer. Both tensors may be anywhere,
    mapped from a file too; each block is brought to `device` by itself, so that beyond the result some 600 MB
    are needed there for features up to 2048 wide, whatever N and M. There must be k samples in the bank.

    For each block of queries:
    1. the similarities to one block of the bank
    2. the k nearest of that block
    3. merged with those of the blocks before

    Similarities are products of normalised features, in float32 on the CPU. On CUDA these are rounded to
    float16, multiplied exactly and summed in float32, so that a similarity is off by some 1e-5 and neighbours
    that differ by less may change places. On any device the last bit depends on how the library sums, and
    thereby may on the size of a block.
    """
    M, N, width = len(queries_MF), len(bank_NF), bank_NF.shape[1]
    rows = max(1, MAX_VALUES // width)
    similarities_Mk, positions_Mk = torch.empty(M, k), torch.empty(M, k, dtype=torch.int64)
    for first in range(0, M, rows):
        queries_mF = _unit(queries_MF[first : first + rows], device)
        m = len(queries_mF)
        nearest_mk = torch.empty(m, 0, device=device)
        indices_mk = torch.empty(m, 0, dtype=torch.int64, device=device)
        step = max(1, min(rows, MAX_SIMILARITIES // m))
        for start in range(0, N, step):
            block_nF = _unit(bank_NF[start : start + step], device)
            found_mk, where_mk = _nearest_of_block(_products(queries_mF, block_nF), k)  # 1, 2
            nearest_mk, order_mk = torch.cat([nearest_mk, found_mk], dim=1).sort(
                dim=1, descending=True, stable=True
            )  # 3: positions of earlier blocks are lower, and stay before equal ones
            nearest_mk = nearest_mk[:, :k]
            indices_mk = torch.cat([indices_mk, where_mk + start], dim=1).gather(1, order_mk[:, :k])
            if progress is not None:
                progress(first * N + m * min(start + step, N), M * N)
        similarities_Mk[first : first + m], positions_Mk[first : first + m] = nearest_mk, indices_mk
    return similarities_Mk, positions_Mk


def _unit(rows_nF: Tensor, device: torch.device | str) -> Tensor:
    """On `device`, of length 1; float16 on CUDA."""
    unit_nF = normalize(rows_nF.to(device).float())
    return unit_nF.half() if unit_nF.is_cuda else unit_nF


def _products(queries_mF: Tensor, block_nF: Tensor) -> Tensor:
    """(m, n), float32."""
    if queries_mF.is_cuda:  # without `out_dtype` the sums would be rounded to float16
        return torch.mm(queries_mF, block_nF.T, out_dtype=torch.float32)
    return queries_mF @ block_nF.T


def _nearest_of_block(similarities_mn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, n) largest of each row and where they are; of equal ones that with the lower position first.

    `topk` gives the right values, but any of equal ones; so rows where more than k reach the k-th value are
    sorted.
    """
    k = min(k, similarities_mn.shape[1])
    largest_mk, indices_mk = similarities_mn.topk(k)
    is_tied_m = (similarities_mn >= largest_mk[:, -1:]).sum(dim=1) > k
    few = max(1, 2**24 // similarities_mn.shape[1])
    for rows in is_tied_m.nonzero().squeeze(1).split(few):
        sorted_rows = similarities_mn[rows].sort(dim=1, descending=True, stable=True)
        largest_mk[rows], indices_mk[rows] = sorted_rows.values[:, :k], sorted_rows.indices[:, :k]
    indices_mk, order_mk = indices_mk.sort(dim=1)
    largest_mk, again_mk = largest_mk.gather(1, order_mk).sort(dim=1, descending=True, stable=True)
    return largest_mk, indices_mk.gather(1, again_mk)
