"""Twin batch-norm on top of torch's own batch-norm operations, one view after the other, on any device.

`model/norm/kernels.py` holds the same two functions as Triton kernels. Statistics are float32 (float64 for
float64 tensors). Several groups of rows, one per rank, are merged by the formula of Chan, Golub and LeVeque
(1979).

Shape legend: V views; M rows (samples times pixels) of a view on this rank; C channels; G groups of rows;
K = 2 V + 1 statistics of a group: V means, V sums of squares about them, and the number of rows.
"""

import torch
from torch import Tensor

from model.collectives import gather_rows, sum_over_ranks
from model.norm.options import Options, Running


def forward(
    x_VMC: Tensor,
    residual_VMC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    running: Running,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The output in the dtype of `x_VMC`, and the statistics that the backward pass needs, (K, C).

    These are V means, V times 1 / sqrt(variance + eps) and the number of rows of a view on all ranks.
    """
    moments_GKC = _moments(x_VMC)[None]
    if options.over_ranks:
        moments_GKC = gather_rows(moments_GKC[0]).unflatten(0, (-1, moments_GKC.shape[1]))
    mean_VC, var_VC, count_C = _merge(moments_GKC)
    _update(running, mean_VC, var_VC * (count_C / (count_C - 1)), options.momentum)

    y_VMC = torch.empty_like(x_VMC)
    for x_MC, y_MC, mean_C, var_C in zip(x_VMC, y_VMC, mean_VC, var_VC, strict=True):
        out = y_MC, mean_C.new_empty(0), mean_C.new_empty(0)
        torch.native_batch_norm(x_MC, weight_C, bias_C, mean_C, var_C, False, 0.0, options.eps, out=out)
    if residual_VMC is not None:
        y_VMC += residual_VMC
    if options.relu:
        y_VMC.relu_()
    return y_VMC, torch.cat([mean_VC, torch.rsqrt(var_VC + options.eps), count_C[None]])


def backward(
    dy_VMC: Tensor,
    x_VMC: Tensor,
    y_VMC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_KC: Tensor,
    has_residual: bool,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients for x, the residual (None without one), the weight and the bias.

    Those for weight and bias are this rank's share of the sum over ranks. `y_VMC` is the output where there
    is a ReLU.
    """
    V = len(x_VMC)
    mean_VC, rstd_VC, count_C = statistics_KC[:V], statistics_KC[V : 2 * V], statistics_KC[-1]
    g_VMC = torch.ops.aten.threshold_backward(dy_VMC, y_VMC, 0) if options.relu else dy_VMC
    wanted = [not options.over_ranks, True, True]
    views = [
        torch.ops.aten.native_batch_norm_backward(
            g_MC, x_MC, weight_C, None, None, mean_C, rstd_C, True, options.eps, wanted
        )
        for g_MC, x_MC, mean_C, rstd_C in zip(g_VMC, x_VMC, mean_VC, rstd_VC, strict=True)
    ]
    dweight_VC, dbias_VC = (torch.stack(gradients) for gradients in list(zip(*views, strict=True))[1:])
    if options.over_ranks:
        sums_2VC = sum_over_ranks(torch.stack([dweight_VC, dbias_VC])) / count_C
        scale_VC = rstd_VC * weight_C
        dx_VMC = x_VMC - mean_VC[:, None]  # three passes over memory, two of them in place
        slope_VC, offset_VC = -scale_VC * rstd_VC * sums_2VC[0], -scale_VC * sums_2VC[1]
        torch.addcmul(offset_VC[:, None], dx_VMC, slope_VC[:, None], out=dx_VMC)
        dx_VMC = dx_VMC.addcmul_(g_VMC, scale_VC[:, None]).to(x_VMC.dtype)
    elif g_VMC is dy_VMC or has_residual:
        dx_VMC = torch.stack([dx_MC for dx_MC, _, _ in views])
    else:  # into memory that is at hand and not needed any more
        dx_VMC = g_VMC
        for own_MC, (dx_MC, _, _) in zip(dx_VMC, views, strict=True):
            own_MC.copy_(dx_MC)
    return dx_VMC, g_VMC if has_residual else None, dweight_VC.sum(0), dbias_VC.sum(0)


def _moments(x_VMC: Tensor) -> Tensor:
    """(K, C): means, sums of squares about them, and number of rows."""
    _, M, C = x_VMC.shape
    dtype = torch.promote_types(x_VMC.dtype, torch.float32)
    # Of no use but to make torch return its statistics in `dtype`.
    unused = torch.zeros(2, C, dtype=dtype, device=x_VMC.device)
    views = [torch.batch_norm_update_stats(x_MC, *unused, 0.0) for x_MC in x_VMC]
    means_VC, vars_VC = (list(statistics) for statistics in zip(*views, strict=True))
    return torch.stack([*means_VC, *(var_C * M for var_C in vars_VC), torch.full_like(unused[0], M)])


def _merge(moments_GKC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means (V, C), biased variances (V, C) and number of rows (C,) of all groups together."""
    V = moments_GKC.shape[1] // 2
    mean_GVC, squares_GVC, count_G1C = moments_GKC.split([V, V, 1], 1)
    total_1C = count_G1C.sum(0)
    # Relative to the first group, so that equal means stay exactly what they are.
    mean_VC = mean_GVC[0] + ((mean_GVC - mean_GVC[0]) * (count_G1C / total_1C)).sum(0)
    squares_VC = squares_GVC.sum(0) + (count_G1C * (mean_GVC - mean_VC).square()).sum(0)
    return mean_VC, squares_VC / total_1C, total_1C[0]


def _update(running: Running, mean_VC: Tensor, unbiased_var_VC: Tensor, momentum: float) -> None:
    """As if the views had come one after the other."""
    for mean_C, var_C in zip(mean_VC, unbiased_var_VC, strict=True):
        running.mean_C.lerp_(mean_C.to(running.mean_C.dtype), momentum)
        running.var_C.lerp_(var_C.to(running.var_C.dtype), momentum)
    running.batches.add_(len(mean_VC))
