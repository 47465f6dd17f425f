"""Batch-norm layers that know how many views their batch holds.

Shape legend: V views; N samples of all views, the first view's first; C channels; M rows (samples times
pixels) of a view.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.collectives import world_size
from model.errors import ModelError
from model.norm.function import twin_batch_norm
from model.norm.options import Options, Running


class TwinBatchNorm(nn.BatchNorm2d):
    """Batch-norm over dimension 1 of (N, C) or (N, C, H, W), with an optional residual and ReLU.

    In training each of the `num_views` equal parts of the batch is normalised by its own statistics, and the
    running statistics are those after one pass for each part. `num_views` is 1, and this is `nn.BatchNorm2d`,
    except inside `joined_views`. If `synchronised`, the statistics are those of the samples of all ranks; one
    collective in each direction sees to all views. In evaluation mode it uses the running statistics.

    Statistics are float32 (float64 for float64 input); the output has the input's dtype. Parameters, buffers
    and state-dict names are those of `nn.BatchNorm2d`, so checkpoints fit both.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        relu: bool = False,
        synchronised: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device=device)
        self.relu = relu  # the output ends with max(0, .)
        self.synchronised = synchronised
        self.num_views = 1

    @torch.compiler.disable  # it has kernels and collectives of its own; what lies between is compiled
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, ...) of the input's dtype; `residual`, of the input's shape and dtype, needs a ReLU.

        Raises `ModelError` in training where the batch is no whole number of samples per view, or a channel
        has a single value.
        """
        if residual is not None and not self.relu:
            raise ValueError("a residual needs a batch-norm with relu=True")
        if not self.training:
            y = super().forward(input)
            y = y if residual is None else y.add_(residual)
            return y.relu_() if self.relu else y
        self._check_training_batch(input)
        return self._train_forward(input, residual)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}, synchronised={self.synchronised}"

    def _train_forward(self, input: Tensor, residual: Tensor | None) -> Tensor:
        x = input.movedim(1, -1)  # a view with contiguous rows where the input is channels-last
        y_VMC = twin_batch_norm(
            self._rows(input),
            None if residual is None else self._rows(residual),
            torch.ones_like(self.running_mean) if self.weight is None else self.weight,
            torch.zeros_like(self.running_mean) if self.bias is None else self.bias,
            Running(self.running_mean, self.running_var, self.num_batches_tracked),
            Options(self.eps, self.momentum, self.relu, self.synchronised and world_size() > 1),
        )
        return y_VMC.view(x.shape).movedim(-1, 1)

    def _rows(self, x: Tensor) -> Tensor:
        """(V, M, C), contiguous."""
        return x.movedim(1, -1).reshape(self.num_views, -1, self.num_features).contiguous()

    def _check_training_batch(self, input: Tensor) -> None:
        if len(input) % self.num_views:
            raise ModelError(
                f"A batch of {self.num_views} joined views needs as many samples of each, but has "
                f"{len(input)} samples; pass views of equal size."
            )
        values = input.numel() // input.shape[1] // self.num_views
        if values * (world_size() if self.synchronised else 1) < 2:
            raise ModelError(
                f"Batch-norm needs more than one value per channel in training, but an input of shape "
                f"{tuple(input.shape)} has {values} for each of {self.num_views} views; take larger batches."
            )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch-norm expects (N, C, ...), not {tuple(input.shape)}")


@contextmanager
def joined_views(norms: Iterable[TwinBatchNorm], num_views: int) -> Iterator[None]:
    """Inside, the training batches of `norms` hold `num_views` views, all samples of the first one first."""
    norms = list(norms)
    for norm in norms:
        norm.num_views = num_views
    try:
        yield
    finally:
        for norm in norms:
            norm.num_views = 1


def synchronise_norms(module: nn.Module) -> nn.Module:
    """Give every batch-norm inside `module` statistics over all ranks; returns the module.

    Parameters, buffers and state-dict names stay as they are. Torch's own layers become its `SyncBatchNorm`,
    as in the authors' code, which runs on CUDA only; elsewhere they become `TwinBatchNorm`.
    """
    on_cuda = any(parameter.is_cuda for parameter in module.parameters())
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, TwinBatchNorm):
                norm.synchronised = True
            elif isinstance(norm, _BatchNorm):
                convert = nn.SyncBatchNorm.convert_sync_batchnorm if on_cuda else _twin_norm
                setattr(parent, name, convert(norm))
    return module


def _twin_norm(norm: _BatchNorm) -> TwinBatchNorm:
    twin = TwinBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, synchronised=True)
    twin.to(norm.running_mean).load_state_dict(norm.state_dict())
    return twin.train(norm.training)
