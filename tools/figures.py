"""The project's pictures, each as the bytes of a PNG file. Plain data in, so that any caller can draw them.

Shape legend: H and W pixels, D embedding width.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
LINE = "#2563ab"
# One fixed colour per phase of a step, in the order of the phases; told apart also without colour vision.
PHASE_COLOURS = {
    "data wait": "#d55e00",
    "copy": "#994000",
    "step": "#00507d",
    "augment": "#e69f00",
    "forward": "#0072b2",
    "loss": "#009e73",
    "backward": "#56b4e9",
    "exposed communication": "#cc79a7",
    "optimizer": "#8c6bb1",
    "idle": "#b8c0c8",
}
DOTS_PER_INCH = 160


def image_png(image_HWC: np.ndarray) -> bytes:
    """A uint8 RGB image as it is."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="png")
    return buffer.getvalue()


def curve_png(steps: Sequence[int], values: Sequence[float], title: str) -> bytes:
    """One quantity over the training steps; logarithmic where it spans more than a factor of 10."""
    figure, axes = empty_figure(4.6, 2.7)
    axes.plot(steps, values, color=LINE, linewidth=1.6)
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("step")
    axes.grid(axis="y", color=GRID)
    return png_of(figure)


def correlation_png(c_DD: np.ndarray, title: str) -> bytes:
    """A cross-correlation matrix as a heat map from -1 (blue) over 0 (white) to 1 (red)."""
    figure, axes = empty_figure(4.6, 3.9)
    picture = axes.imshow(c_DD, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("feature of view b")
    axes.set_ylabel("feature of view a")
    bar = figure.colorbar(picture, ax=axes, ticks=[-1, 0, 1], shrink=0.85)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=9)
    return png_of(figure)


def phases_png(seconds: Mapping[str, float], title: str) -> bytes:
    """The mean time of each phase of a step, end to end in one bar, with milliseconds and shares."""
    total = sum(seconds.values())
    figure, axes = empty_figure(6.4, 2.9)
    left = 0.0
    for phase, duration in seconds.items():
        width = 1000 * duration
        label = f"{phase}  {width:.1f} ms, {duration / total:.1%}"
        axes.barh(0, width, left=left, color=PHASE_COLOURS[phase], edgecolor="white", label=label)
        left += width
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("milliseconds of one step")
    axes.set_xlim(0, left)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return png_of(figure)


def empty_figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    """An empty figure of that size in inches, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, styled(figure.add_subplot())


def styled(axes: "Axes") -> "Axes":
    """The same axes in the project's colours."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)
    return axes


def png_of(figure: "Figure") -> bytes:
    """The bytes of the PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
