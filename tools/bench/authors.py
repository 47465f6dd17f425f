"""The loss as the authors' published code has it, to compare with.

On several ranks their batch-norm is torch's `SyncBatchNorm`, which exists on GPUs only. Among CPU ranks the
batch-norm is the plain definition over gloo instead, so only the GPU figures are those of their own code.

Shape legend: n samples of a rank, D embedding width.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.collectives import world_size
from model.norm import TwinBatchNorm


class AuthorsLoss(nn.Module):
    """The total as the authors' published code computes it, differentiated by autograd; for comparison only.

    Batch-norm without affine parameters on both embeddings, C over the batch and summed in place over ranks,
    a copy of all its elements off the diagonal, squares in place. Under `torch.autocast` where the
    embeddings are in half precision. `batch` is the size of the global batch.
    """

    def __init__(self, width: int, batch: int, weight: float, device: torch.device) -> None:
        super().__init__()
        norm = nn.BatchNorm1d
        if world_size() > 1:
            norm = nn.SyncBatchNorm if device.type == "cuda" else partial(TwinBatchNorm, synchronised=True)
        self.norm = norm(width, affine=False, device=device)
        self.batch, self.weight = batch, weight

    def forward(self, z_a_nD: Tensor, z_b_nD: Tensor) -> Tensor:
        half = z_a_nD.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(z_a_nD.device.type, z_a_nD.dtype if half else None, enabled=half):
            c_DD = self.norm(z_a_nD).T @ self.norm(z_b_nD)
            c_DD.div_(self.batch)
            if world_size() > 1:
                dist.all_reduce(c_DD.detach())  # the same memory; autograd sees nothing of it, as in theirs
            invariance = c_DD.diagonal().sub_(1).pow_(2).sum()
            # In rows of D + 1 elements instead of D, the diagonal becomes the first column.
            D = len(c_DD)
            off_diagonal = c_DD.view(-1)[:-1].view(D - 1, D + 1)[:, 1:].flatten()
            return invariance + self.weight * off_diagonal.pow_(2).sum()
