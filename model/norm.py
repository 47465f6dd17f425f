"""Batch normalisation with statistics over the batches of all ranks.

On CUDA this is torch's own `SyncBatchNorm`, which runs nowhere else, and whose forward pass makes the host
wait for the device: it leaves out ranks without samples. `GlobalBatchNorm` is the plain definition in
differentiable torch operations for CPU ranks (gloo).
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.collectives import differentiable_sum_over_ranks, world_size


class GlobalBatchNorm(_BatchNorm):
    """Batch-norm over the channel dimension 1 of any input (N, C, ...), statistics over all ranks.

    Same parameters, buffers and state-dict names as `nn.BatchNorm2d`. Statistics are float32 (float64 for
    float64 input) whatever the input's precision; the output has the input's dtype.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch-norm expects (N, C, ...), not {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # Every rank holds the same number of samples, as the loaders guarantee.
        count = x.numel() // x.shape[1] * world_size()
        mean_C = differentiable_sum_over_ranks(x.sum(dims)) / count
        centred = x - mean_C.view(shape)
        var_C = differentiable_sum_over_ranks(centred.square().sum(dims)) / count
        self._update_running_statistics(mean_C.detach(), var_C.detach() * count / max(count - 1, 1))
        y = centred * torch.rsqrt(var_C + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    def _update_running_statistics(self, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased_var_C.to(self.running_var.dtype), self.momentum)


def synchronise_norms(module: nn.Module) -> nn.Module:
    """Give every batch-norm of `module` statistics over all ranks, as the authors do; returns the module.

    Parameters, buffers and state-dict names stay as they are.
    """
    if any(parameter.is_cuda for parameter in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, _BatchNorm):
                setattr(parent, name, _global_norm(norm))
    return module


def _global_norm(norm: _BatchNorm) -> GlobalBatchNorm:
    copy = GlobalBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    copy.to(norm.running_mean).load_state_dict(norm.state_dict())
    return copy.train(norm.training)
