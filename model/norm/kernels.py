"""Twin batch-norm with optional residual and ReLU as Triton kernels; the functions of `torch_ops`.

No autograd. Activations are contiguous, row-major, of one dtype (float16, bfloat16 or float32) and on the
current device; everything per channel is float32, as are all sums. There are no atomics: the same inputs give
the same bits. Each element of an activation that a pass needs is read once and written once. Passes over the
V M C elements of e bytes:

    forward     moments      reads x                          e
                normalise    reads x (and r), writes y        2 e, with a residual 3 e
    backward    reduce       reads dy and x                   2 e; with a residual it reads y too,
                                                              and writes dr: 4 e
                gradient     reads dy (or dr) and x, writes dx    3 e

Without a residual the backward pass finds out from x where the ReLU was zero. The passes between these touch
a few numbers per channel.

Reductions walk down blocks of LANES channels. Their programs share the rows out in blocks of ROWS, by turns,
so that all go through memory together, and the pass that follows begins where they end: that is still in the
cache. Block sizes are constants; only the number of programs depends on the shapes.

Shape legend: V views; M rows (samples times pixels) of a view on this rank; C channels; S row splits; G
groups of rows, from splits or ranks; K = 2 V + 1 statistics of a group: V means, V sums of squares about
them, and the number of rows; in a program R rows and L channels of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from model.collectives import gather_rows, sum_over_ranks_
from model.norm.options import Options, Running

ROWS, LANES = 64, 64  # block of every pass over activations
MIN_PROGRAMS = 256  # of a reduction: two for each SM of the largest GPUs, which run all at once
MAX_SPLITS = 128
MERGE_LANES = 16  # channels of a program that merges groups
FUSED = {"enable_fp_fusion": True}  # fused multiply-add, whatever a release of Triton defaults to


def count_splits(V: int, M: int, C: int) -> int:
    """In how many parts a reduction shares the rows of a view."""
    return min(cdiv(MIN_PROGRAMS, V * cdiv(C, LANES)), MAX_SPLITS, cdiv(M, ROWS))


@triton.jit
def _merge(
    count_G,  # float32: rows in each group, not 0 in the first, 0 where there is none
    mean_GL,
    squares_GL,  # sums of squares about each group's mean
):
    """Mean and sum of squares (L,) of the groups together (Chan, Golub and LeVeque 1979, for many groups)."""
    is_first_G1 = (tl.arange(0, count_G.shape[0]) == 0)[:, None]
    share_G1 = (count_G / tl.sum(count_G))[:, None]
    # Relative to the first group, so that equal means stay exactly what they are.
    first_L = tl.sum(tl.where(is_first_G1, mean_GL, 0.0), 0)
    mean_L = first_L + tl.sum(share_G1 * (mean_GL - first_L[None, :]), 0)
    from_mean_GL = mean_GL - mean_L[None, :]
    squares_L = tl.sum(squares_GL + count_G[:, None] * from_mean_GL * from_mean_GL, 0)
    return mean_L, squares_L


@triton.jit(do_not_specialize=["M"])
def _moments_kernel(
    x_VMC,  # (V, M, C)
    moments_SKC,  # (S, K, C) float32, out
    M,
    C,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    lanes_L = tl.program_id(0) * LANES + tl.arange(0, LANES)
    in_width_L = lanes_L < C
    split, S = tl.program_id(1), tl.num_programs(1)
    view, V = tl.program_id(2), tl.num_programs(2)
    x_MC = x_VMC + view.to(tl.int64) * M * C
    # 1
    first_MC = x_MC + (split * ROWS).to(tl.int64) * C
    pivot_L = tl.load(first_MC + lanes_L, mask=in_width_L, other=0).to(tl.float32)
    # 2
    mean_RL = tl.zeros((ROWS, LANES), tl.float32)
    squares_RL = tl.zeros((ROWS, LANES), tl.float32)
    met = 0.0
    for start in tl.range(split * ROWS, M, S * ROWS, num_stages=4):
        met += 1.0
        share = 1 / met
        rows_R = start + tl.arange(0, ROWS)
        mask_RL = (rows_R < M)[:, None] & in_width_L[None, :]
        offsets_RL = rows_R.to(tl.int64)[:, None] * C + lanes_L[None, :]
        x_RL = tl.load(x_MC + offsets_RL, mask=mask_RL, other=0).to(tl.float32) - pivot_L[None, :]
        from_mean_RL = tl.where(mask_RL, x_RL - mean_RL, 0.0)
        mean_RL += from_mean_RL * share
        squares_RL += tl.where(mask_RL, from_mean_RL * (x_RL - mean_RL), 0.0)
    # 3
    first_R = split * ROWS + tl.arange(0, ROWS)
    count_R = ((tl.maximum(M - first_R, 0) + S * ROWS - 1) // (S * ROWS)).to(tl.float32)
    mean_L, squares_L = _merge(count_R, mean_RL, squares_RL)
    moments_KC = moments_SKC + split * (2 * V + 1) * C + lanes_L
    tl.store(moments_KC + view * C, pivot_L + mean_L, mask=in_width_L)
    tl.store(moments_KC + (V + view) * C, squares_L, mask=in_width_L)
    if view == 0:
        count_L = tl.zeros((LANES,), tl.float32) + tl.sum(count_R)
        tl.store(moments_KC + 2 * V * C, count_L, mask=in_width_L)


def moments(x_VMC: Tensor) -> Tensor:
    """Means, sums of squares about them, and numbers of rows of S groups of rows, (S, K, C).

    1. Shift every channel by the group's first row, so that a mean far from zero costs no precision.
    2. Each element of a block keeps the running moments of the rows it meets (Welford 1962).
    3. Merge the block's rows.
    """
    V, M, C = x_VMC.shape
    S = count_splits(V, M, C)
    moments_SKC = x_VMC.new_empty((S, 2 * V + 1, C), dtype=torch.float32)
    _moments_kernel[cdiv(C, LANES), S, V](x_VMC, moments_SKC, M, C, ROWS, LANES, num_warps=8, **FUSED)
    return moments_SKC


@triton.jit
def _merge_groups(
    moments_GKC,  # (G, K, C)
    view,
    G,
    C,
    lanes_L,
    in_width_L,
    V: tl.constexpr,
    MAX_GROUPS: tl.constexpr,  # power of two, at least G
):
    """Number of rows (a scalar), mean and sum of squares (L,) of one view in all groups."""
    groups_G = tl.arange(0, MAX_GROUPS)
    moments_KC = moments_GKC + groups_G * (2 * V + 1) * C
    mask_GL = (groups_G < G)[:, None] & in_width_L[None, :]
    at_GL = moments_KC[:, None] + lanes_L[None, :]
    count_G = tl.load(moments_KC + 2 * V * C, mask=groups_G < G, other=0)
    mean_GL = tl.load(at_GL + view * C, mask=mask_GL, other=0)
    squares_GL = tl.load(at_GL + (V + view) * C, mask=mask_GL, other=0)
    mean_L, squares_L = _merge(count_G, mean_GL, squares_GL)
    return tl.sum(count_G), mean_L, squares_L


@triton.jit(do_not_specialize=["G"])
def _merge_kernel(
    moments_GKC,  # (G, K, C) float32
    out_KC,  # (K, C) float32, out
    G,
    C,
    V: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    lanes_L = tl.program_id(0) * LANES + tl.arange(0, LANES)
    in_width_L = lanes_L < C
    for view in tl.static_range(V):
        count, mean_L, squares_L = _merge_groups(moments_GKC, view, G, C, lanes_L, in_width_L, V, MAX_GROUPS)
        tl.store(out_KC + view * C + lanes_L, mean_L, mask=in_width_L)
        tl.store(out_KC + (V + view) * C + lanes_L, squares_L, mask=in_width_L)
        tl.store(out_KC + 2 * V * C + lanes_L, tl.zeros((LANES,), tl.float32) + count, mask=in_width_L)


def merge(moments_GKC: Tensor) -> Tensor:
    """The moments of all groups together, (K, C)."""
    G, K, C = moments_GKC.shape
    out_KC = torch.empty_like(moments_GKC[0])
    _merge_kernel[(cdiv(C, MERGE_LANES),)](
        moments_GKC, out_KC, G, C, K // 2, next_power_of_2(G), MERGE_LANES, **FUSED
    )
    return out_KC


@triton.jit(do_not_specialize=["G"])
def _finish_kernel(
    moments_GKC,  # (G, K, C) float32
    running_mean_C,  # (C,), in and out
    running_var_C,  # (C,), in and out
    batches,  # () int64, in and out
    statistics_KC,  # (K, C) float32, out
    G,
    C,
    eps,
    momentum,
    V: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    lanes_L = tl.program_id(0) * LANES + tl.arange(0, LANES)
    in_width_L = lanes_L < C
    running_mean_L = tl.load(running_mean_C + lanes_L, mask=in_width_L).to(tl.float32)
    running_var_L = tl.load(running_var_C + lanes_L, mask=in_width_L).to(tl.float32)
    for view in tl.static_range(V):
        count, mean_L, squares_L = _merge_groups(moments_GKC, view, G, C, lanes_L, in_width_L, V, MAX_GROUPS)
        rstd_L = tl.div_rn(1.0, tl.sqrt_rn(squares_L / count + eps))
        tl.store(statistics_KC + view * C + lanes_L, mean_L, mask=in_width_L)
        tl.store(statistics_KC + (V + view) * C + lanes_L, rstd_L, mask=in_width_L)
        tl.store(statistics_KC + 2 * V * C + lanes_L, tl.zeros((LANES,), tl.float32) + count, mask=in_width_L)
        running_mean_L += momentum * (mean_L - running_mean_L)
        running_var_L += momentum * (squares_L / (count - 1) - running_var_L)
    tl.store(running_mean_C + lanes_L, running_mean_L, mask=in_width_L)
    tl.store(running_var_C + lanes_L, running_var_L, mask=in_width_L)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + V)


def finish(moments_GKC: Tensor, running: Running, options: Options) -> Tensor:
    """The statistics for normalising, see `torch_ops.forward`, and the update of the running ones."""
    G, K, C = moments_GKC.shape
    statistics_KC = torch.empty_like(moments_GKC[0])
    _finish_kernel[(cdiv(C, MERGE_LANES),)](
        *(moments_GKC, *running, statistics_KC, G, C, options.eps, options.momentum),
        *(K // 2, next_power_of_2(G), MERGE_LANES),
        **FUSED,
    )
    return statistics_KC


@triton.jit
def _place(M, C, V: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """This program's block in a pass over all elements, last rows first: view, rows (R,), channels (L,)."""
    lane_blocks = tl.cdiv(C, LANES)
    program = tl.program_id(0)
    row_block = tl.cdiv(M, ROWS) - 1 - program // (V * lane_blocks)
    view = program // lane_blocks % V
    lanes_L = program % lane_blocks * LANES + tl.arange(0, LANES)
    return view, row_block * ROWS + tl.arange(0, ROWS), lanes_L


def _grid(V: int, M: int, C: int) -> tuple[int]:
    return (V * cdiv(M, ROWS) * cdiv(C, LANES),)


@triton.jit
def _load_channels(
    statistics_KC,  # (K, C) float32
    weight_C,  # (C,) float32
    bias_C,  # (C,) float32
    view,
    C,
    lanes_L,
    in_width_L,
    V: tl.constexpr,
):
    """Mean, 1 / std, weight and bias of a block's channels, each (1, L)."""
    mean_L = tl.load(statistics_KC + view * C + lanes_L, mask=in_width_L, other=0)
    rstd_L = tl.load(statistics_KC + (V + view) * C + lanes_L, mask=in_width_L, other=0)
    weight_L = tl.load(weight_C + lanes_L, mask=in_width_L, other=0)
    bias_L = tl.load(bias_C + lanes_L, mask=in_width_L, other=0)
    return mean_L[None, :], rstd_L[None, :], weight_L[None, :], bias_L[None, :]


@triton.jit(do_not_specialize=["M"])
def _normalise_kernel(
    x_VMC,  # (V, M, C)
    residual_VMC,  # (V, M, C), or None
    weight_C,  # (C,) float32
    bias_C,  # (C,) float32
    statistics_KC,  # (K, C) float32
    y_VMC,  # (V, M, C), out
    M,
    C,
    V: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    view, rows_R, lanes_L = _place(M, C, V, ROWS, LANES)
    in_width_L = lanes_L < C
    mask_RL = (rows_R < M)[:, None] & in_width_L[None, :]
    offsets_RL = (view.to(tl.int64) * M + rows_R)[:, None] * C + lanes_L[None, :]
    mean_1L, rstd_1L, weight_1L, bias_1L = _load_channels(
        statistics_KC, weight_C, bias_C, view, C, lanes_L, in_width_L, V
    )
    x_RL = tl.load(x_VMC + offsets_RL, mask=mask_RL).to(tl.float32)
    y_RL = (x_RL - mean_1L) * rstd_1L * weight_1L + bias_1L
    if residual_VMC is not None:
        y_RL += tl.load(residual_VMC + offsets_RL, mask=mask_RL).to(tl.float32)
    if RELU:
        y_RL = tl.where(y_RL <= 0, 0.0, y_RL)  # NaN stays
    tl.store(y_VMC + offsets_RL, y_RL, mask=mask_RL)


def normalise(
    x_VMC: Tensor,
    residual_VMC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_KC: Tensor,
    relu: bool,
) -> Tensor:
    """The output y, in one pass."""
    y_VMC = torch.empty_like(x_VMC)
    V, M, C = x_VMC.shape
    _normalise_kernel[_grid(V, M, C)](
        *(x_VMC, residual_VMC, weight_C, bias_C, statistics_KC, y_VMC, M, C, V, relu, ROWS, LANES),
        num_warps=8,
        **FUSED,
    )
    return y_VMC


@triton.jit(do_not_specialize=["M"])
def _reduce_kernel(
    dy_VMC,  # (V, M, C)
    x_VMC,  # (V, M, C)
    y_VMC,  # (V, M, C), or None without a residual
    weight_C,  # (C,) float32
    bias_C,  # (C,) float32
    statistics_KC,  # (K, C) float32
    dresidual_VMC,  # (V, M, C), out; or None without a residual
    sums_S2VC,  # (S, 2, V, C) float32, out
    M,
    C,
    RELU: tl.constexpr,  # and no residual
    V: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    lanes_L = tl.program_id(0) * LANES + tl.arange(0, LANES)
    in_width_L = lanes_L < C
    split, S = tl.program_id(1), tl.num_programs(1)
    view = tl.program_id(2)
    mean_1L, rstd_1L, weight_1L, bias_1L = _load_channels(
        statistics_KC, weight_C, bias_C, view, C, lanes_L, in_width_L, V
    )
    sum_g_RL = tl.zeros((ROWS, LANES), tl.float32)
    sum_gx_RL = tl.zeros((ROWS, LANES), tl.float32)
    for start in tl.range(split * ROWS, M, S * ROWS, num_stages=3):
        rows_R = start + tl.arange(0, ROWS)
        mask_RL = (rows_R < M)[:, None] & in_width_L[None, :]
        offsets_RL = (view.to(tl.int64) * M + rows_R)[:, None] * C + lanes_L[None, :]
        g_RL = tl.load(dy_VMC + offsets_RL, mask=mask_RL, other=0).to(tl.float32)
        x_RL = tl.load(x_VMC + offsets_RL, mask=mask_RL, other=0).to(tl.float32)
        normalised_RL = (x_RL - mean_1L) * rstd_1L
        if RELU:
            g_RL = tl.where(normalised_RL * weight_1L + bias_1L <= 0, 0.0, g_RL)
        if y_VMC is not None:
            y_RL = tl.load(y_VMC + offsets_RL, mask=mask_RL, other=0)
            g_RL = tl.where(y_RL <= 0, 0.0, g_RL)
            tl.store(dresidual_VMC + offsets_RL, g_RL, mask=mask_RL)
        sum_g_RL += g_RL
        sum_gx_RL += tl.where(mask_RL, g_RL * normalised_RL, 0.0)
    sums_C = sums_S2VC + (split * 2 * V + view) * C + lanes_L
    tl.store(sums_C, tl.sum(sum_g_RL, 0), mask=in_width_L)
    tl.store(sums_C + V * C, tl.sum(sum_gx_RL, 0), mask=in_width_L)


def reduce(
    dy_VMC: Tensor,
    x_VMC: Tensor,
    y_VMC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_KC: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums of g and of g times the normalised x over S groups of rows, (S, 2, V, C), and dr.

    g is the gradient that comes through the ReLU if there is one. With a residual `y_VMC` is the output, and
    dr = g; else both are None.
    """
    V, M, C = x_VMC.shape
    S = count_splits(V, M, C)
    dresidual_VMC = None if y_VMC is None else torch.empty_like(dy_VMC)
    sums_S2VC = statistics_KC.new_empty(S, 2, V, C)
    _reduce_kernel[cdiv(C, LANES), S, V](
        *(dy_VMC, x_VMC, y_VMC, weight_C, bias_C, statistics_KC, dresidual_VMC, sums_S2VC),
        *(M, C, relu and y_VMC is None, V, ROWS, LANES),
        num_warps=8,
        **FUSED,
    )
    return sums_S2VC, dresidual_VMC


@triton.jit(do_not_specialize=["S"])
def _total_kernel(
    sums_S2VC,  # (S, 2, V, C) float32
    total_2VC,  # (2, V, C) float32, out
    dweight_C,  # (C,) float32, out
    dbias_C,  # (C,) float32, out
    S,
    C,
    V: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    lanes_L = tl.program_id(0) * LANES + tl.arange(0, LANES)
    in_width_L = lanes_L < C
    splits_S = tl.arange(0, MAX_GROUPS)
    mask_SL = (splits_S < S)[:, None] & in_width_L[None, :]
    at_SL = sums_S2VC + splits_S[:, None] * (2 * V * C) + lanes_L[None, :]
    dbias_L = tl.zeros((LANES,), tl.float32)
    dweight_L = tl.zeros((LANES,), tl.float32)
    for view in tl.static_range(V):
        sum_g_L = tl.sum(tl.load(at_SL + view * C, mask=mask_SL, other=0), 0)
        sum_gx_L = tl.sum(tl.load(at_SL + (V + view) * C, mask=mask_SL, other=0), 0)
        tl.store(total_2VC + view * C + lanes_L, sum_g_L, mask=in_width_L)
        tl.store(total_2VC + (V + view) * C + lanes_L, sum_gx_L, mask=in_width_L)
        dbias_L += sum_g_L
        dweight_L += sum_gx_L
    tl.store(dbias_C + lanes_L, dbias_L, mask=in_width_L)
    tl.store(dweight_C + lanes_L, dweight_L, mask=in_width_L)


def total(sums_S2VC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over all groups, (2, V, C), and the gradients for weight and bias, (C,)."""
    S, _, V, C = sums_S2VC.shape
    total_2VC = torch.empty_like(sums_S2VC[0])
    dweight_C, dbias_C = sums_S2VC.new_empty(C), sums_S2VC.new_empty(C)
    _total_kernel[(cdiv(C, MERGE_LANES),)](
        sums_S2VC, total_2VC, dweight_C, dbias_C, S, C, V, next_power_of_2(S), MERGE_LANES, **FUSED
    )
    return total_2VC, dweight_C, dbias_C


@triton.jit(do_not_specialize=["M"])
def _gradient_kernel(
    g_VMC,  # (V, M, C): dy, or with a residual dr
    x_VMC,  # (V, M, C)
    weight_C,  # (C,) float32
    bias_C,  # (C,) float32
    statistics_KC,  # (K, C) float32
    total_2VC,  # (2, V, C) float32
    dx_VMC,  # (V, M, C), out
    M,
    C,
    RELU: tl.constexpr,  # and no residual
    V: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    view, rows_R, lanes_L = _place(M, C, V, ROWS, LANES)
    in_width_L = lanes_L < C
    mask_RL = (rows_R < M)[:, None] & in_width_L[None, :]
    offsets_RL = (view.to(tl.int64) * M + rows_R)[:, None] * C + lanes_L[None, :]
    mean_1L, rstd_1L, weight_1L, bias_1L = _load_channels(
        statistics_KC, weight_C, bias_C, view, C, lanes_L, in_width_L, V
    )
    g_RL = tl.load(g_VMC + offsets_RL, mask=mask_RL).to(tl.float32)
    x_RL = tl.load(x_VMC + offsets_RL, mask=mask_RL).to(tl.float32)
    normalised_RL = (x_RL - mean_1L) * rstd_1L
    if RELU:
        g_RL = tl.where(normalised_RL * weight_1L + bias_1L <= 0, 0.0, g_RL)
    count_L = tl.load(statistics_KC + 2 * V * C + lanes_L, mask=in_width_L, other=1)
    mean_g_L = tl.load(total_2VC + view * C + lanes_L, mask=in_width_L) / count_L
    mean_gx_L = tl.load(total_2VC + (V + view) * C + lanes_L, mask=in_width_L) / count_L
    dx_RL = (g_RL - mean_g_L[None, :] - normalised_RL * mean_gx_L[None, :]) * (rstd_1L * weight_1L)
    tl.store(dx_VMC + offsets_RL, dx_RL, mask=mask_RL)


def gradient(
    g_VMC: Tensor,
    x_VMC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_KC: Tensor,
    total_2VC: Tensor,
    relu: bool,
) -> Tensor:
    """dx, in one pass. `g_VMC` is dy, and `relu` whether it has still to go through the ReLU."""
    dx_VMC = torch.empty_like(x_VMC)
    V, M, C = x_VMC.shape
    _gradient_kernel[_grid(V, M, C)](
        *(g_VMC, x_VMC, weight_C, bias_C, statistics_KC, total_2VC, dx_VMC, M, C, relu, V, ROWS, LANES),
        num_warps=8,
        **FUSED,
    )
    return dx_VMC


def forward(
    x_VMC: Tensor,
    residual_VMC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    running: Running,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """As `torch_ops.forward`."""
    moments_GKC = moments(x_VMC)
    if options.over_ranks:
        K = moments_GKC.shape[1]
        moments_GKC = gather_rows(merge(moments_GKC)).unflatten(0, (-1, K))
    statistics_KC = finish(moments_GKC, running, options)
    return normalise(x_VMC, residual_VMC, weight_C, bias_C, statistics_KC, options.relu), statistics_KC


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
    """As `torch_ops.backward`."""
    sums_S2VC, dresidual_VMC = reduce(
        dy_VMC, x_VMC, y_VMC if has_residual else None, weight_C, bias_C, statistics_KC, options.relu
    )
    total_2VC, dweight_C, dbias_C = total(sums_S2VC)
    if options.over_ranks:
        sum_over_ranks_(total_2VC)
    g_VMC, relu = (dresidual_VMC, False) if has_residual else (dy_VMC, options.relu)
    dx_VMC = gradient(g_VMC, x_VMC, weight_C, bias_C, statistics_KC, total_2VC, relu)
    return dx_VMC, dresidual_VMC, dweight_C, dbias_C
