"""The passes around the loss's matrix products as Triton kernels, with the launchers of `torch_ops`.

No autograd. Tensors are contiguous, row-major and on the current device; embeddings are float16, bfloat16 or
float32; K and P are float32, as are all sums. Every pass reads each element of its operands once; launchers
say how many bytes that moves, where an element of the embeddings has e bytes. There are no atomics: the same
inputs give the same bits.

Block sizes are constants; only the number of programs depends on the shapes. Column sums walk down blocks of
COLS columns, 256 programs at D = 8192. Where these are too few to fill a GPU the rows are split as well, and
a second launch adds the parts.

Shape legend: n rows and D columns at hand, N samples of the global batch, M columns of a Gram matrix; S row
splits, P programs; in a program R rows and C columns of a block, L elements of a flat block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from model.loss.objective import EPS

ROWS, COLS = 64, 32  # block of the column sums: a few such in flight on each SM keep its memory busy
MIN_PROGRAMS = 256  # about two for each SM of the largest GPUs
MAX_SPLITS = 64
TILE_ROWS, TILE_COLS = 32, 128  # block of the element-wise passes
FLAT, MAX_PARTS = 1024, 1024  # block of `inner_and_cast`, and most programs
DIAGONAL = 8192  # block of `terms`
FUSED = {"enable_fp_fusion": True}  # fused multiply-add, whatever a release of Triton defaults to


def split_rows(n: int, D: int) -> tuple[int, int]:
    """(splits, rows in each but perhaps the last) with which column sums of (n, D) fill a GPU."""
    wanted = min(cdiv(MIN_PROGRAMS, cdiv(D, COLS)), MAX_SPLITS)
    rows = ROWS * cdiv(n, ROWS * wanted)
    return cdiv(n, rows), rows


@triton.jit
def _merge_moments(
    count_R,  # float32: rows in each of R groups, 0 for none
    mean_a_RC,
    mean_b_RC,
    aa_RC,  # sums of squares and products about each group's means
    bb_RC,
    ab_RC,
):
    """Moments of the R groups together (Chan, Golub and LeVeque 1979, for R groups at once), each (C,)."""
    share_R1 = (count_R / tl.sum(count_R))[:, None]
    mean_a_C = tl.sum(share_R1 * mean_a_RC, 0)
    mean_b_C = tl.sum(share_R1 * mean_b_RC, 0)
    a_RC = mean_a_RC - mean_a_C[None, :]
    b_RC = mean_b_RC - mean_b_C[None, :]
    count_R1 = count_R[:, None]
    aa_C = tl.sum(aa_RC + count_R1 * a_RC * a_RC, 0)
    bb_C = tl.sum(bb_RC + count_R1 * b_RC * b_RC, 0)
    ab_C = tl.sum(ab_RC + count_R1 * a_RC * b_RC, 0)
    return mean_a_C, mean_b_C, aa_C, bb_C, ab_C


@triton.jit
def _store_moments(out_5D, D, cols_C, mask_C, mean_a_C, mean_b_C, aa_C, bb_C, ab_C):
    tl.store(out_5D + cols_C, mean_a_C, mask=mask_C)
    tl.store(out_5D + D + cols_C, mean_b_C, mask=mask_C)
    tl.store(out_5D + 2 * D + cols_C, aa_C, mask=mask_C)
    tl.store(out_5D + 3 * D + cols_C, bb_C, mask=mask_C)
    tl.store(out_5D + 4 * D + cols_C, ab_C, mask=mask_C)


@triton.jit(do_not_specialize=["n", "rows_per_split"])
def _column_moments_kernel(
    z_a_nD,  # (n, D)
    z_b_nD,  # (n, D)
    out_S5D,  # (S, 5, D), out; float64, but float32 and means from the first row unless WHOLE
    n,
    D,
    rows_per_split,
    WHOLE: tl.constexpr,  # one split holds all rows
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols_C = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_width_C = cols_C < D
    first = tl.program_id(1) * rows_per_split
    end = tl.minimum(first + rows_per_split, n)
    # 1: every value relative to the first row's, so that a mean far from zero costs no precision.
    pivot_a_C = tl.load(z_a_nD + cols_C, mask=in_width_C, other=0).to(tl.float32)
    pivot_b_C = tl.load(z_b_nD + cols_C, mask=in_width_C, other=0).to(tl.float32)
    # 2
    mean_a_RC = tl.zeros((ROWS, COLS), tl.float32)
    mean_b_RC = tl.zeros((ROWS, COLS), tl.float32)
    aa_RC = tl.zeros((ROWS, COLS), tl.float32)
    bb_RC = tl.zeros((ROWS, COLS), tl.float32)
    ab_RC = tl.zeros((ROWS, COLS), tl.float32)
    met = 0.0
    for start in tl.range(first, end, ROWS, num_stages=4):
        met += 1.0
        share = 1 / met
        rows_R = start + tl.arange(0, ROWS)
        mask_RC = (rows_R < end)[:, None] & in_width_C[None, :]
        offsets_RC = rows_R.to(tl.int64)[:, None] * D + cols_C[None, :]
        a_RC = tl.load(z_a_nD + offsets_RC, mask=mask_RC, other=0).to(tl.float32) - pivot_a_C[None, :]
        b_RC = tl.load(z_b_nD + offsets_RC, mask=mask_RC, other=0).to(tl.float32) - pivot_b_C[None, :]
        from_mean_a_RC = tl.where(mask_RC, a_RC - mean_a_RC, 0.0)
        from_mean_b_RC = tl.where(mask_RC, b_RC - mean_b_RC, 0.0)
        mean_a_RC += from_mean_a_RC * share
        mean_b_RC += from_mean_b_RC * share
        aa_RC += from_mean_a_RC * (a_RC - mean_a_RC)
        bb_RC += from_mean_b_RC * (b_RC - mean_b_RC)
        ab_RC += from_mean_a_RC * (b_RC - mean_b_RC)
    # 3
    count_R = (end - first - tl.arange(0, ROWS) + ROWS - 1) // ROWS
    mean_a_C, mean_b_C, aa_C, bb_C, ab_C = _merge_moments(
        count_R.to(tl.float32), mean_a_RC, mean_b_RC, aa_RC, bb_RC, ab_RC
    )
    if WHOLE:
        mean_a_C = pivot_a_C.to(tl.float64) + mean_a_C
        mean_b_C = pivot_b_C.to(tl.float64) + mean_b_C
    out_5D = out_S5D + tl.program_id(1) * 5 * D
    _store_moments(out_5D, D, cols_C, in_width_C, mean_a_C, mean_b_C, aa_C, bb_C, ab_C)


@triton.jit(do_not_specialize=["n", "S", "rows_per_split"])
def _merge_splits_kernel(
    z_a_nD,  # (n, D)
    z_b_nD,  # (n, D)
    parts_S5D,  # (S, 5, D) float32, means from the first row
    out_5D,  # (5, D) float64, out
    n,
    D,
    S,
    rows_per_split,
    MAX_SPLITS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols_C = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_width_C = cols_C < D
    splits_S = tl.arange(0, MAX_SPLITS)
    count_S = tl.minimum(n - splits_S * rows_per_split, rows_per_split)
    count_S = tl.where(splits_S < S, count_S, 0)
    mask_SC = (splits_S < S)[:, None] & in_width_C[None, :]
    parts_SC = parts_S5D + splits_S[:, None] * 5 * D + cols_C[None, :]
    mean_a_C, mean_b_C, aa_C, bb_C, ab_C = _merge_moments(
        count_S.to(tl.float32),
        tl.load(parts_SC, mask=mask_SC, other=0),
        tl.load(parts_SC + D, mask=mask_SC, other=0),
        tl.load(parts_SC + 2 * D, mask=mask_SC, other=0),
        tl.load(parts_SC + 3 * D, mask=mask_SC, other=0),
        tl.load(parts_SC + 4 * D, mask=mask_SC, other=0),
    )
    mean_a_C = tl.load(z_a_nD + cols_C, mask=in_width_C).to(tl.float64) + mean_a_C
    mean_b_C = tl.load(z_b_nD + cols_C, mask=in_width_C).to(tl.float64) + mean_b_C
    _store_moments(out_5D, D, cols_C, in_width_C, mean_a_C, mean_b_C, aa_C, bb_C, ab_C)


def column_moments(z_a_nD: Tensor, z_b_nD: Tensor) -> Tensor:
    """float64 (5, D): the means of a and of b, and the sums of a^2, b^2 and ab about these means.

    1. Shift every column by its first sample, which is within sqrt(n) standard deviations of its mean.
    2. Each element of a block keeps the running moments of the rows it meets (Welford 1962).
    3. Merge the block's rows and, in a second launch, the splits, if there are several.

    Reads 2 n D e bytes, in one launch where one split will do: from D = 8161 on, or for n <= 64.
    """
    n, D = z_a_nD.shape
    S, rows = split_rows(n, D)
    grid = cdiv(D, COLS), S
    moments_5D = z_a_nD.new_empty((5, D), dtype=torch.float64)
    parts_S5D = moments_5D if S == 1 else z_a_nD.new_empty((S, 5, D), dtype=torch.float32)
    _column_moments_kernel[grid](  # 1, 2, 3
        z_a_nD, z_b_nD, parts_S5D, n, D, rows, S == 1, ROWS, COLS, num_warps=8, **FUSED
    )
    if S > 1:  # 3
        _merge_splits_kernel[grid[:1]](
            z_a_nD, z_b_nD, parts_S5D, moments_5D, n, D, S, rows, MAX_SPLITS, COLS, **FUSED
        )
    return moments_5D


@triton.jit
def _standardised(
    z_RC,  # float32
    mean_C,  # float64
    rstd_C,  # float32
):
    """(z - mean) rstd, with what the mean loses in float32 made good."""
    rounded_C = mean_C.to(tl.float32)
    lost_C = (rounded_C.to(tl.float64) - mean_C).to(tl.float32)
    return (z_RC - rounded_C[None, :]) * rstd_C[None, :] + (lost_C * rstd_C)[None, :]


@triton.jit(do_not_specialize=["n", "N"])
def _normalise_kernel(
    z_a_nD,  # (n, D)
    z_b_nD,  # (n, D)
    moments_5D,  # (5, D) float64
    a_nD,  # (n, D), out
    b_nD,  # (n, D), out
    rstd_2D,  # (2, D) float32, out
    diagonal_D,  # (D,) float32, out
    n,
    D,
    N,
    eps,
    STANDARDISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols_C = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_width_C = cols_C < D
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # last rows first: the pass before left them in cache
    rows_R = block * ROWS + tl.arange(0, ROWS)
    mask_RC = (rows_R < n)[:, None] & in_width_C[None, :]
    offsets_RC = rows_R.to(tl.int64)[:, None] * D + cols_C[None, :]
    a_RC = tl.load(z_a_nD + offsets_RC, mask=mask_RC).to(tl.float32)
    b_RC = tl.load(z_b_nD + offsets_RC, mask=mask_RC).to(tl.float32)
    mean_a_C = tl.load(moments_5D + cols_C, mask=in_width_C)
    mean_b_C = tl.load(moments_5D + D + cols_C, mask=in_width_C)
    rstd_a_C = tl.full((COLS,), 1.0, tl.float32)
    rstd_b_C = tl.full((COLS,), 1.0, tl.float32)
    if STANDARDISE:
        aa_C = tl.load(moments_5D + 2 * D + cols_C, mask=in_width_C).to(tl.float32)
        bb_C = tl.load(moments_5D + 3 * D + cols_C, mask=in_width_C).to(tl.float32)
        rstd_a_C = tl.div_rn(1.0, tl.sqrt_rn(aa_C / N + eps))
        rstd_b_C = tl.div_rn(1.0, tl.sqrt_rn(bb_C / N + eps))
    a_RC = _standardised(a_RC, mean_a_C, rstd_a_C)
    b_RC = _standardised(b_RC, mean_b_C, rstd_b_C)
    tl.store(a_nD + offsets_RC, a_RC, mask=mask_RC)
    tl.store(b_nD + offsets_RC, b_RC, mask=mask_RC)
    if block == 0:
        ab_C = tl.load(moments_5D + 4 * D + cols_C, mask=in_width_C).to(tl.float32)
        tl.store(rstd_2D + cols_C, rstd_a_C, mask=in_width_C)
        tl.store(rstd_2D + D + cols_C, rstd_b_C, mask=in_width_C)
        tl.store(diagonal_D + cols_C, ab_C * rstd_a_C * rstd_b_C / N, mask=in_width_C)


def normalise(
    z_a_nD: Tensor, z_b_nD: Tensor, moments_5D: Tensor, N: int, standardise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views minus their means and, if `standardise`, over their standard deviations.

    `moments_5D` are those of the N samples. Returns both views in their own dtype, 1 / std as (2, D) (ones
    without `standardise`) and the diagonal of C as (D,), these two in float32. One launch; reads
    2 n D e bytes and writes as many.
    """
    n, D = z_a_nD.shape
    a_nD, b_nD = torch.empty_like(z_a_nD), torch.empty_like(z_b_nD)
    rstd_2D = moments_5D.new_empty((2, D), dtype=torch.float32)
    diagonal_D = torch.empty_like(rstd_2D[0])
    grid = cdiv(D, TILE_COLS), cdiv(n, TILE_ROWS)
    _normalise_kernel[grid](
        *(z_a_nD, z_b_nD, moments_5D, a_nD, b_nD, rstd_2D, diagonal_D, n, D, N, EPS),
        *(standardise, TILE_ROWS, TILE_COLS),
        num_warps=8,
        **FUSED,
    )
    return a_nD, b_nD, rstd_2D, diagonal_D


@triton.jit
def _inner_and_cast_kernel(
    k_a_nM,  # (n, M) float32
    k_b_nM,  # (n, M) float32
    out_a_nM,  # (n, M), out
    out_b_nM,  # (n, M), out
    parts_P,  # (programs,) float32, out
    scale,
    numel,
    per_program,
    FLAT: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * per_program
    sums_L = tl.zeros((FLAT,), tl.float32)
    for start in tl.range(0, per_program, FLAT):
        offsets_L = first + start + tl.arange(0, FLAT)
        mask_L = offsets_L < numel
        k_a_L = tl.load(k_a_nM + offsets_L, mask=mask_L, other=0) * scale
        k_b_L = tl.load(k_b_nM + offsets_L, mask=mask_L, other=0) * scale
        tl.store(out_a_nM + offsets_L, k_a_L, mask=mask_L)
        tl.store(out_b_nM + offsets_L, k_b_L, mask=mask_L)
        sums_L += k_a_L * k_b_L
    tl.store(parts_P + tl.program_id(0), tl.sum(sums_L))


def inner_and_cast(
    k_a_nM: Tensor, k_b_nM: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`scale` K_A and `scale` K_B in `dtype`, and the sum of the products of their elements (0-d).

    Two launches, the second over at most 1024 partial sums; reads 8 n M bytes and writes 2 n M e.
    """
    numel = k_a_nM.numel()
    per_program = FLAT * cdiv(numel, FLAT * MAX_PARTS)
    programs = cdiv(numel, per_program)
    out_a_nM, out_b_nM = torch.empty_like(k_a_nM, dtype=dtype), torch.empty_like(k_b_nM, dtype=dtype)
    parts_P = k_a_nM.new_empty(programs)
    _inner_and_cast_kernel[(programs,)](
        k_a_nM, k_b_nM, out_a_nM, out_b_nM, parts_P, scale, numel, per_program, FLAT, **FUSED
    )
    return out_a_nM, out_b_nM, parts_P.sum()


@triton.jit
def _terms_kernel(
    diagonal_D,  # (D,) float32
    squares,  # () float32
    total,  # () float32, out
    invariance,  # () float32, out
    redundancy,  # () float32, out
    g_D,  # (D,) float32, out
    invariance_weight,
    off_diagonal_weight,
    D,
    DIAGONAL: tl.constexpr,
):
    invariance_L = tl.zeros((DIAGONAL,), tl.float32)
    squares_L = tl.zeros((DIAGONAL,), tl.float32)
    for start in tl.range(0, D, DIAGONAL):
        cols_L = start + tl.arange(0, DIAGONAL)
        mask_L = cols_L < D
        c_L = tl.load(diagonal_D + cols_L, mask=mask_L, other=0)
        missing_L = tl.where(mask_L, 1 - c_L, 0.0)
        tl.store(g_D + cols_L, -2 * (invariance_weight * missing_L + off_diagonal_weight * c_L), mask=mask_L)
        invariance_L += missing_L * missing_L
        squares_L += c_L * c_L
    invariance_sum = tl.sum(invariance_L)
    redundancy_sum = tl.load(squares) - tl.sum(squares_L)
    tl.store(invariance, invariance_sum)
    tl.store(redundancy, redundancy_sum)
    tl.store(total, invariance_weight * invariance_sum + off_diagonal_weight * redundancy_sum)


def terms(
    diagonal_D: Tensor, squares: Tensor, invariance_weight: float, off_diagonal_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, invariance, redundancy), 0-d, and g (D,), from the diagonal of C and its sum of squares.

    g is the derivative of the total for C_ii, less the 2 off_diagonal_weight C_ii by which the derivative of
    `squares` exceeds that of the redundancy. One launch of one program; 8 D bytes.
    """
    total, invariance, redundancy = (torch.empty_like(squares) for _ in range(3))
    g_D = torch.empty_like(diagonal_D)
    _terms_kernel[(1,)](
        *(diagonal_D, squares, total, invariance, redundancy, g_D),
        *(invariance_weight, off_diagonal_weight, len(diagonal_D), DIAGONAL),
        num_warps=16,
        **FUSED,
    )
    return total, invariance, redundancy, g_D


@triton.jit(do_not_specialize=["n", "rows_per_split"])
def _column_reduction_kernel(
    p_a_nD,  # (n, D) float32
    p_b_nD,  # (n, D) float32
    a_nD,  # (n, D)
    b_nD,  # (n, D)
    out_S2D,  # (S, 2, D) float32, out
    n,
    D,
    rows_per_split,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols_C = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_width_C = cols_C < D
    first = tl.program_id(1) * rows_per_split
    end = tl.minimum(first + rows_per_split, n)
    sums_a_RC = tl.zeros((ROWS, COLS), tl.float32)
    sums_b_RC = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=3):
        rows_R = start + tl.arange(0, ROWS)
        mask_RC = (rows_R < end)[:, None] & in_width_C[None, :]
        offsets_RC = rows_R.to(tl.int64)[:, None] * D + cols_C[None, :]
        p_a_RC = tl.load(p_a_nD + offsets_RC, mask=mask_RC, other=0)
        p_b_RC = tl.load(p_b_nD + offsets_RC, mask=mask_RC, other=0)
        sums_a_RC += p_a_RC * tl.load(a_nD + offsets_RC, mask=mask_RC, other=0).to(tl.float32)
        sums_b_RC += p_b_RC * tl.load(b_nD + offsets_RC, mask=mask_RC, other=0).to(tl.float32)
    out_C = out_S2D + tl.program_id(1) * 2 * D + cols_C
    tl.store(out_C, tl.sum(sums_a_RC, 0), mask=in_width_C)
    tl.store(out_C + D, tl.sum(sums_b_RC, 0), mask=in_width_C)


def column_reduction(p_a_nD: Tensor, p_b_nD: Tensor, a_nD: Tensor, b_nD: Tensor) -> Tensor:
    """(2, D): the sums over the rows of P_A A and of P_B B, element by element.

    Launches as `column_moments`; reads n D (8 + 2 e) bytes.
    """
    n, D = a_nD.shape
    S, rows = split_rows(n, D)
    parts_S2D = p_a_nD.new_empty((S, 2, D))
    grid = cdiv(D, COLS), S
    _column_reduction_kernel[grid](
        p_a_nD, p_b_nD, a_nD, b_nD, parts_S2D, n, D, rows, ROWS, COLS, num_warps=8, **FUSED
    )
    return parts_S2D[0] if S == 1 else parts_S2D.sum(0)


@triton.jit(do_not_specialize=["n", "N"])
def _embedding_gradients_kernel(
    p_a_nD,  # (n, D) float32
    p_b_nD,  # (n, D) float32
    a_nD,  # (n, D)
    b_nD,  # (n, D)
    reduced_2D,  # (2, D) float32, or None
    rstd_2D,  # (2, D) float32
    diagonal_D,  # (D,) float32
    g_D,  # (D,) float32
    grad_total,  # () of any floating dtype
    grad_a_nD,  # (n, D), out
    grad_b_nD,  # (n, D), out
    n,
    D,
    N,
    alpha,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols_C = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_width_C = cols_C < D
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # last rows first: the pass before left them in cache
    rows_R = block * ROWS + tl.arange(0, ROWS)
    mask_RC = (rows_R < n)[:, None] & in_width_C[None, :]
    offsets_RC = rows_R.to(tl.int64)[:, None] * D + cols_C[None, :]
    p_a_RC = tl.load(p_a_nD + offsets_RC, mask=mask_RC)
    p_b_RC = tl.load(p_b_nD + offsets_RC, mask=mask_RC)
    a_RC = tl.load(a_nD + offsets_RC, mask=mask_RC).to(tl.float32)
    b_RC = tl.load(b_nD + offsets_RC, mask=mask_RC).to(tl.float32)
    g_C = tl.load(g_D + cols_C, mask=in_width_C)
    rstd_a_C = tl.load(rstd_2D + cols_C, mask=in_width_C)
    rstd_b_C = tl.load(rstd_2D + D + cols_C, mask=in_width_C)
    scale = tl.load(grad_total).to(tl.float32) / N
    grad_a_RC = alpha * p_a_RC + b_RC * g_C[None, :]
    grad_b_RC = alpha * p_b_RC + a_RC * g_C[None, :]
    if reduced_2D is not None:
        g_c_C = g_C * tl.load(diagonal_D + cols_C, mask=in_width_C)
        q_a_C = alpha * tl.load(reduced_2D + cols_C, mask=in_width_C) / N + g_c_C
        q_b_C = alpha * tl.load(reduced_2D + D + cols_C, mask=in_width_C) / N + g_c_C
        grad_a_RC -= a_RC * q_a_C[None, :]
        grad_b_RC -= b_RC * q_b_C[None, :]
    tl.store(grad_a_nD + offsets_RC, grad_a_RC * (rstd_a_C * scale)[None, :], mask=mask_RC)
    tl.store(grad_b_nD + offsets_RC, grad_b_RC * (rstd_b_C * scale)[None, :], mask=mask_RC)


def embedding_gradients(
    p_a_nD: Tensor,
    p_b_nD: Tensor,
    a_nD: Tensor,
    b_nD: Tensor,
    reduced_2D: Tensor | None,
    rstd_2D: Tensor,
    diagonal_D: Tensor,
    g_D: Tensor,
    alpha: float,
    grad_total: Tensor,
    N: int,
) -> tuple[Tensor, Tensor]:
    """Gradients for both views' embeddings, in the dtype of `a_nD`: grad_total / N rstd (dA - A q).

    dA = alpha P_A + B g and q = alpha `reduced_2D` / N + g diagonal, or 0 without `reduced_2D`; see
    `torch_ops.embedding_gradients`. One launch; reads n D (8 + 2 e) bytes and writes 2 n D e.
    """
    n, D = a_nD.shape
    grad_a_nD, grad_b_nD = torch.empty_like(a_nD), torch.empty_like(b_nD)
    grid = cdiv(D, TILE_COLS), cdiv(n, TILE_ROWS)
    _embedding_gradients_kernel[grid](
        *(p_a_nD, p_b_nD, a_nD, b_nD, reduced_2D, rstd_2D, diagonal_D, g_D, grad_total),
        *(grad_a_nD, grad_b_nD, n, D, N, alpha, TILE_ROWS, TILE_COLS),
        num_warps=8,
        **FUSED,
    )
    return grad_a_nD, grad_b_nD
