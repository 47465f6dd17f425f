"""Batch-norm by the kernels of NVIDIA's apex (`apex.contrib.groupbn`), for comparison with them.

They take float16 tensors whose memory is (N, H, W, C), sum over groups of 2, 4 or 8 GPUs of one machine, and
know nothing of views: each view is a call of its own, and the outputs are copied into one batch.

Shape legend: V views; N samples of a view; H and W pixels; C channels.
"""

import torch
from torch import Tensor

from model.collectives import world_size
from model.errors import ModelError
from model.norm.layers import TwinBatchNorm

GROUPS = (1, 2, 4, 8)


def check_apex() -> None:
    """Raise `ModelError` where apex's batch-norm cannot be imported."""
    try:
        from apex.contrib.groupbn import batch_norm  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"model.norm apex needs apex.contrib.groupbn, which cannot be imported ({error}); build apex "
            f"with --bnp, or set model.norm to twin."
        ) from error


class ApexBatchNorm(TwinBatchNorm):
    """`TwinBatchNorm` for (N, C, H, W) whose training passes are apex's."""

    def __init__(self, num_features: int, **options: object) -> None:
        check_apex()
        super().__init__(num_features, **options)
        self._layers: list = []

    def _train_forward(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if input.dtype != torch.float16:
            raise ModelError(
                f"apex's batch-norm trains in float16 on a GPU, not in {str(input.dtype)[6:]} on "
                f"{input.device}; set train.precision to fp16, or model.norm to twin."
            )
        if not self._layers:
            self._layers.append(self._build_layer())
        layer = self._layers[0]
        layer.weight, layer.bias = self.weight, self.bias
        layer.running_mean, layer.running_var = self.running_mean, self.running_var
        xs_NHWC = input.movedim(1, -1).contiguous().chunk(self.num_views)
        outputs_NHWC = []
        for view, x_NHWC in enumerate(xs_NHWC):
            # The backward pass reads these two again, and apex has one pair of them for all calls.
            layer.minibatch_mean = torch.empty_like(self.running_mean)
            layer.minibatch_riv = torch.empty_like(self.running_var)
            z_NHWC = None
            if residual is not None:
                z_NHWC = residual.movedim(1, -1).contiguous().chunk(self.num_views)[view]
            outputs_NHWC.append(layer(x_NHWC, z_NHWC))
        self.num_batches_tracked.add_(self.num_views)
        return torch.cat(outputs_NHWC).movedim(-1, 1)

    def _build_layer(self) -> torch.nn.Module:
        from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

        group = world_size() if self.synchronised else 1
        if group not in GROUPS:
            raise ModelError(
                f"apex's batch-norm sums over 2, 4 or 8 GPUs of one machine, not over {group}; set "
                f"model.norm to twin, or model.sync_bn to none."
            )
        try:
            layer = BatchNorm2d_NHWC(self.num_features, fuse_relu=self.relu, bn_group=group)
        except Exception as error:  # no GPU, or apex built for another version of torch
            raise ModelError(
                f"apex's batch-norm does not start ({str(error).splitlines()[0]}); set model.norm to twin."
            ) from error
        layer.eps, layer.momentum = self.eps, self.momentum
        return layer.train()
