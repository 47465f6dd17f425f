"""The pictures of an audit, each as the bytes of a PNG file.

Shape legend: H and W pixels, C colours (3).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from eval.audit.groups import Group
from eval.audit.invariance import Curve, Invariance
from eval.audit.leaks import Leak
from tools.figures import GRID, INK, LINE, MUTED, empty_figure, image_png, png_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAME, OTHER, PLAIN = "#0072b2", "#d55e00", "#9aa5b1"  # told apart also without colour vision
TILE, BORDER, GAP, QUERY_GAP = 84, 4, 4, 16  # pixels
COLUMNS = 4
MAX_GROUPS = 40


def sheet_png(rows: Sequence[Sequence[np.ndarray]], is_same: Sequence[Sequence[bool | None]]) -> bytes:
    """A query at the start of each row, then its neighbours.

    `rows` holds uint8 RGB images (H, W, C) of any size, `is_same` for each neighbour whether it is of the
    query's class, which its frame shows, or None.
    """
    side = TILE + 2 * BORDER
    longest = max(len(row) for row in rows)
    canvas = Image.new(
        "RGB", (longest * (side + GAP) + QUERY_GAP - GAP, len(rows) * (side + GAP) - GAP), "white"
    )
    colours = {True: SAME, False: OTHER, None: PLAIN}
    for y, (row, same) in enumerate(zip(rows, is_same, strict=True)):
        for x, (pixels_HWC, colour) in enumerate(zip(row, [INK, *map(colours.get, same)], strict=True)):
            fitted = ImageOps.fit(Image.fromarray(pixels_HWC), (TILE, TILE), Image.BICUBIC)
            left = x * (side + GAP) + (QUERY_GAP if x else 0)
            canvas.paste(ImageOps.expand(fitted, BORDER, colour), (left, y * (side + GAP)))
    return image_png(np.asarray(canvas))


def groups_png(groups: Sequence[Group], overall: float, title: str) -> bytes:
    """Accuracies with their intervals, lowest at the bottom; of many only the lowest and the highest."""
    ordered = sorted(groups, key=lambda group: group.accuracy)
    if len(ordered) > MAX_GROUPS:
        ordered = ordered[: MAX_GROUPS // 2] + ordered[-MAX_GROUPS // 2 :]
    figure, axes = empty_figure(6.4, 1.2 + 0.22 * len(ordered))
    axes.axvline(overall, color=MUTED, linewidth=1, linestyle="--")
    for y, group in enumerate(ordered):
        _interval(axes, y, group.low, group.accuracy, group.high, PLAIN if group.too_small else LINE)
    names = [f"{group.name} ({group.images})" for group in ordered]
    _name_rows(axes, names, title, "accuracy; dashed: all images")
    return png_of(figure)


def leaks_png(leaks: Sequence[Leak]) -> bytes:
    """How well each attribute can be read, with its interval, beside what probes of nothing get."""
    figure, axes = empty_figure(6.4, 1.2 + 0.3 * len(leaks))
    for y, leak in enumerate(reversed(leaks)):
        _interval(axes, y, leak.low, leak.balanced_accuracy, leak.high, OTHER if leak.leaks else PLAIN)
        axes.plot([max(leak.chance, leak.shuffled)] * 2, [y - 0.3, y + 0.3], color=INK, linewidth=1.4)
    names = [leak.name for leak in reversed(leaks)]
    _name_rows(axes, names, "What can be read", "balanced accuracy; upright line: chance")
    return png_of(figure)


def invariance_png(invariance: Invariance) -> bytes:
    """A small plot for each distortion: mean similarity by strength, and where four fifths of images lie."""
    from matplotlib.figure import Figure

    num_rows = -(-len(invariance.curves) // COLUMNS)
    figure = Figure(figsize=(2.3 * COLUMNS, 2.0 * num_rows), layout="constrained")
    lowest = min(each.p10 for curve in invariance.curves for each in curve.similarities)
    bottom = min(lowest, invariance.baseline.p10) - 0.03
    for place, curve in enumerate(invariance.curves, start=1):
        axes = styled(figure.add_subplot(num_rows, COLUMNS, place))
        axes.axhspan(invariance.baseline.p10, invariance.baseline.p90, color=GRID, linewidth=0)
        axes.axhline(invariance.baseline.mean, color=MUTED, linewidth=1, linestyle="--")
        _draw_curve(axes, curve)
        axes.set_ylim(bottom, 1.03)
        axes.set_title(curve.name, loc="left", fontsize=10, color=INK)
        axes.set_xlabel(curve.unit)
    return png_of(figure)


def spectrum_png(eigenvalues: Sequence[float]) -> bytes:
    """Shares of the variance by rank, both logarithmic."""
    shares = np.asarray(eigenvalues) / max(sum(eigenvalues), 1e-300)
    figure, axes = empty_figure(6.4, 2.9)
    positive = shares > 1e-12
    axes.loglog(np.arange(1, len(shares) + 1)[positive], shares[positive], color=LINE, linewidth=1.6)
    axes.set_title("Share of the variance by principal component", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("component, largest first")
    axes.grid(color=GRID)
    return png_of(figure)


def _draw_curve(axes: "Axes", curve: Curve) -> None:
    order = sorted(range(len(curve.strengths)), key=curve.strengths.__getitem__)
    x = [curve.strengths[place] for place in order]
    spreads = [curve.similarities[place] for place in order]
    means, low, high = ([getattr(each, of) for each in spreads] for of in ("mean", "p10", "p90"))
    if len(x) == 1:
        axes.plot(x * 2, [*low, *high], color=LINE, linewidth=5, alpha=0.25, solid_capstyle="butt")
        axes.set_xticks([])
    axes.fill_between(x, low, high, color=LINE, alpha=0.2, linewidth=0)
    axes.plot(x, means, color=LINE, linewidth=1.6, marker="o", markersize=3.5)


def _interval(axes: "Axes", y: float, low: float, value: float, high: float, colour: str) -> None:
    axes.plot([low, high], [y, y], color=colour, linewidth=1.6)
    axes.plot([value], [y], color=colour, marker="o", markersize=5)


def _name_rows(axes: "Axes", names: Sequence[str], title: str, unit: str) -> None:
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=GRID)
