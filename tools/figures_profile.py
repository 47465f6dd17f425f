"""The pictures of a profile of kernels, each as the bytes of a PNG file."""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.figures import GRID, INK, MUTED, _figure, _png

# Told apart also without colour vision.
KIND_COLOURS = {
    "convolution": "#0072b2",
    "batch-norm and element-wise": "#e69f00",
    "matrix products": "#009e73",
    "collectives": "#cc79a7",
    "copies": "#994000",
    "other": "#b8c0c8",
}


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

    figure, axes = _figure(6.4, 3.9)
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
    return _png(figure)
