"""The pictures of a profile, each as the bytes of a PNG file."""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.figures import GRID, INK, LINE, MUTED, PHASE_COLOURS, empty_figure, png_of

# Told apart also without colour vision.
KIND_COLOURS = {
    "convolution": "#0072b2",
    "batch-norm and element-wise": "#e69f00",
    "matrix products": "#009e73",
    "collectives": "#cc79a7",
    "copies": "#994000",
    "other": "#b8c0c8",
}
WAITING = {"data wait", "copy", "exposed communication", "idle"}


def ceilings_png(pairs_per_second: Mapping[str, float], run: float) -> bytes:
    """What each part can do alone as bars, logarithmic, and the run's own rate as a line."""
    figure, axes = empty_figure(6.4, 0.7 + 0.34 * len(pairs_per_second))
    names = list(pairs_per_second)[::-1]
    rates = [pairs_per_second[name] for name in names]
    axes.barh(names, rates, color=LINE, height=0.62)
    for name, rate in zip(names, rates, strict=True):
        axes.annotate(f" {rate:,.0f}", (rate, name), va="center", fontsize=8, color=INK)
    axes.axvline(run, color=PHASE_COLOURS["data wait"], linewidth=1.6)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_title(f"Alone; the line is the run itself, {run:,.0f}", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("pairs of views per second")
    return png_of(figure)


def ranks_png(ranks: Sequence[Mapping[str, Any]]) -> bytes:
    """A bar for each rank, of the phases of its mean step."""
    figure, axes = empty_figure(6.4, 1.5 + 0.3 * len(ranks))
    names = [f"{rank['rank']}, {rank['host']}" for rank in ranks]
    left = [0.0] * len(ranks)
    for phase, colour in PHASE_COLOURS.items():
        widths = [1000 * rank["phases"].get(phase, 0.0) for rank in ranks]
        if any(widths):
            hatch = "//" if phase in WAITING else None
            axes.barh(names, widths, left=left, color=colour, edgecolor="white", hatch=hatch, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_title("A step on each rank; hatched is waiting", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("milliseconds")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    return png_of(figure)


def shares_png(shares: Mapping[str, float]) -> bytes:
    """Shares of the kernel time, the largest first."""
    by_size = sorted(shares.items(), key=lambda item: item[1])
    figure, axes = empty_figure(4.8, 0.7 + 0.34 * len(by_size))
    axes.barh([name for name, _ in by_size], [100 * share for _, share in by_size], color=LINE, height=0.62)
    for name, share in by_size:
        axes.annotate(f" {share:.0%}", (100 * share, name), va="center", fontsize=8, color=INK)
    axes.margins(x=0.15)
    axes.set_title("Kernel time by kind", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("percent")
    return png_of(figure)


def timeline_png(timeline: Mapping[str, Sequence[float]]) -> bytes:
    """The series of `timeline` over its "seconds", as shares of 1."""
    figure, axes = empty_figure(6.4, 2.6)
    for (name, values), colour in zip(
        ((name, values) for name, values in timeline.items() if name != "seconds"),
        (LINE, *PHASE_COLOURS.values()),
        strict=False,
    ):
        axes.plot(timeline["seconds"], values, linewidth=1.4, color=colour, label=name.replace("_", " "))
    axes.set_ylim(0, None)
    axes.set_title("Use of the machine", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("seconds")
    axes.grid(axis="y", color=GRID)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=MUTED)
    return png_of(figure)


def roofline_png(rows_by_kind: Mapping[str, Sequence[Mapping[str, Any]]], peaks: Mapping[str, Any]) -> bytes:
    """Operations per second over operations per byte of each kernel, below the two measured roofs.

    `rows_by_kind` has the rows of `trace_steps` by their kind; those without a count of operations or bytes
    have no place in the picture and are left out. A dot is larger the longer the kernel takes.
    """
    places = {
        kind: [
            (row["flop"] / row["bytes"], row["flop"] / row["seconds"], row["seconds"])
            for row in rows
            if row["flop"] and row["bytes"] and row["seconds"]
        ]
        for kind, rows in rows_by_kind.items()
    }
    points = [place for of_kind in places.values() for place in of_kind]
    ridge = peaks["flops"] / peaks["bytes_per_second"]
    left = min([ridge, *(intensity for intensity, _, _ in points)]) / 8
    right = max([ridge, *(intensity for intensity, _, _ in points)]) * 8

    figure, axes = empty_figure(6.4, 3.9)
    roof = [left * peaks["bytes_per_second"], peaks["flops"], peaks["flops"]]
    axes.plot([left, ridge, right], roof, color=INK, linewidth=1.4)
    flops, rate = peaks["flops"] / 1e12, peaks["bytes_per_second"] / 1e9
    label = f"{flops:.3g} TFLOP/s in {peaks['precision']}, {rate:.3g} GB/s"
    axes.annotate(
        label,
        (right, peaks["flops"]),
        (0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=MUTED,
    )
    longest = max((seconds for _, _, seconds in points), default=1.0)
    for kind, of_kind in places.items():
        if of_kind:
            intensities, speeds, seconds = zip(*of_kind, strict=True)
            areas = [12 + 188 * s / longest for s in seconds]
            axes.scatter(
                intensities, speeds, areas, color=KIND_COLOURS[kind], alpha=0.8, edgecolor="white", label=kind
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_title("Kernels below the measured roofs", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("operations per second")
    axes.yaxis.label.set(color=MUTED, fontsize=9)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    if points:
        legend = figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
        for handle in legend.legend_handles:
            handle.set_sizes([40])
    return png_of(figure)
