"""Which of the exact algorithms is the quickest that fits, by arithmetic alone.

Shape legend: W ranks, n samples of a rank, N = W n of the global batch, D embedding width, d = D / W columns.
"""

from typing import NamedTuple

SUM_BYTES = 4  # of float32, in which all sums are taken
COLLECTIVE_SECONDS = 30e-6  # what a collective costs whatever it carries


class Hardware(NamedTuple):
    """What one rank has."""

    flops: float  # matrix products, operations per second
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second that the rank can send
    memory: float  # bytes that the loss may take


class Estimate(NamedTuple):
    """What one algorithm costs one rank, forward and backward."""

    algorithm: str
    flop: float  # of the matrix products
    bytes_sent: float  # ring all-reduce and all-gather, direct all-to-all
    peak_bytes: float  # beyond the embeddings, their gradients included
    milliseconds: float  # predicted


class Plan(NamedTuple):
    """The estimates of all algorithms, the chosen one's name, and why it was chosen."""

    estimates: list[Estimate]
    algorithm: str
    reason: str


def plan(N: int, D: int, W: int, operand_bytes: int, hardware: Hardware) -> Plan:
    """Compare the algorithms for embeddings of `operand_bytes` an element."""
    names = [name for name in ALGORITHMS_PLANNED if name != "sharded" or 1 < W <= D]  # else nothing to shard
    estimates = [estimate(name, N, D, W, operand_bytes, hardware) for name in names]
    fitting = [e for e in estimates if e.peak_bytes <= hardware.memory]
    times = ", ".join(f"{e.algorithm} {float(f'{e.milliseconds:.3g}'):,g} ms" for e in estimates)
    if not fitting:
        best = min(estimates, key=lambda e: e.peak_bytes)
        return Plan(estimates, best.algorithm, f"{best.algorithm} needs the least memory, and none fits")
    best = min(fitting, key=lambda e: e.milliseconds)
    reason = f"{best.algorithm} is predicted to be the quickest ({times})"
    if len(fitting) < len(estimates):
        left_out = " and ".join(e.algorithm for e in estimates if e not in fitting)
        reason += f" of those that fit into memory, as {left_out} would not"
    return Plan(estimates, best.algorithm, reason)


def estimate(name: str, N: int, D: int, W: int, operand_bytes: int, hardware: Hardware) -> Estimate:
    """The cost of one algorithm; n and d are rounded up."""
    flop, bytes_sent, collectives, peak_bytes, bytes_moved = _COSTS[name](N, D, W, operand_bytes)
    seconds = (
        flop / hardware.flops
        + bytes_moved / hardware.memory_bandwidth
        + (bytes_sent / hardware.link_bandwidth + collectives * COLLECTIVE_SECONDS if W > 1 else 0)
    )
    return Estimate(name, flop, bytes_sent, peak_bytes, 1000 * seconds)


def _all_reduce(elements: float, W: int) -> float:
    """Bytes that each rank of a ring sends to sum that many float32 elements."""
    return 2 * (W - 1) / W * SUM_BYTES * elements


def _passes(rows: float, columns: float, e: int) -> float:
    """Bytes moved by the passes around the products: 8 over operands, 3 over float32 products, both views.

    Moments read Z; normalisation reads Z and writes A; the products read A twice and write P; the column
    reduction reads A and P; the gradients read A and P and write dZ.
    """
    return 2 * rows * columns * (8 * e + 3 * SUM_BYTES)


def _statistics(D: int, W: int) -> float:
    """Bytes sent for means and moments (float64), the column reduction of the backward pass, and counts."""
    return _all_reduce((2 * (2 + 3) + 2) * D, W) + _all_reduce(2 * W, W)


def _backward_peak(views: float, e: int) -> float:
    """Bytes of A and P of both views, and half as much again for the passes after the products.

    That is for what takes more: one view's gradient and a float32 temporary of torch's passes, or both
    views' gradients from Triton's, which in float32 too are new tensors.
    """
    return 1.5 * views * (e + SUM_BYTES)


def _gram_peak(products: float) -> float:
    """Bytes of the float32 products K and as much again.

    That is for Triton's new tensors in float32; for torch's operands and float32 temporary in half precision.
    """
    return 2 * products * SUM_BYTES


def _dense(N: int, D: int, W: int, e: int) -> tuple[float, ...]:
    n = -(-N // W)
    bytes_sent = _all_reduce(D * D, W) + _statistics(D, W)
    views = 2 * n * D
    copy = D * D * e if e < SUM_BYTES else 0  # of C as an operand
    forward = views * e + D * D * SUM_BYTES + copy
    backward = _backward_peak(views, e) + D * D * e
    moved = _passes(n, D, e) + D * D * (4 * SUM_BYTES + 2 * e) + (D * D * SUM_BYTES + copy if copy else 0)
    return 6 * n * D * D, bytes_sent, 5, max(forward, backward), moved


def _gram(N: int, D: int, W: int, e: int) -> tuple[float, ...]:
    n = -(-N // W)
    bytes_sent = 2 * (W - 1) * n * D * e + _all_reduce(1, W) + _statistics(D, W)
    views = 2 * n * D
    gathered = 2 * N * D * e if W > 1 else 0
    grams = 2 * n * N
    forward = views * e + gathered + _gram_peak(grams)
    backward = _backward_peak(views, e) + gathered + grams * e
    moved = _passes(n, D, e) + 4 * N * D * e * (W > 1) + grams * (2 * SUM_BYTES + 2 * e)
    return 8 * n * N * D, bytes_sent, 7, max(forward, backward), moved


def _sharded(N: int, D: int, W: int, e: int) -> tuple[float, ...]:
    n, d = -(-N // W), -(-D // W)
    exchanged = 2 * n * (D - d) * e  # both views' columns that other ranks own
    bytes_sent = 2 * exchanged + _all_reduce(N * N + N + D, W) + _all_reduce(2 * W, W)
    views = 2 * N * d
    message = N * N * SUM_BYTES
    forward = 2 * views * e + _gram_peak(2 * N * N)  # Z and A; what is sent takes three quarters of the rest
    # A, P and dZ; then one view's dZ in rows, and the other's as received and in rows.
    backward = views * (3.5 * e + SUM_BYTES) + 2 * N * N * e
    moved = _passes(N, d, e) + 4 * views * e + 12 * message + 4 * N * N * e
    return 8 * N * N * d, bytes_sent, 6, max(forward, backward), moved


_COSTS = {"dense": _dense, "gram": _gram, "sharded": _sharded}
ALGORITHMS_PLANNED = tuple(_COSTS)
