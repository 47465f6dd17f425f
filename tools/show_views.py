"""A picture of what the trainer sees: images, their two distorted views, and the numbers drawn for them.

Shape legend: V views (2), N images, C colours (3), H, W pixels, S side of a view in pixels.
"""

import io
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import distort
from pipelines.batch import NUM_VIEWS, ViewParams
from pipelines.config import AugmentConfig, DataConfig
from pipelines.errors import DataError
from pipelines.loaders import build_loader
from pipelines.source import open_source, read_image
from tools.figures import INK, MUTED
from train.config import load_config
from train.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 112
VIEW_COLOURS = "#2563ab", "#d55e00"  # of each view's crop box and heading
# Inches. A row: the image, then a view and its numbers, twice.
MARGIN, GAP, HEADER, SIDE, NUMBERS = 0.25, 0.2, 0.6, 2.0, 1.75
WIDTH = 2 * MARGIN + SIDE + NUM_VIEWS * (2 * GAP + SIDE + NUMBERS)


def show_views(
    dataset: Path,
    out: Path,
    recipe: Path | None = None,
    *,
    num_images: int = 8,
    seed: int | None = None,
    epoch: int = 0,
    size: int | None = None,
) -> int:
    """Write the picture of a dataset's first images in `epoch` to `out`; returns how many there were.

    Distortions and loader are the recipe's, and so are `size` in pixels and `seed` where they are None;
    without a recipe they are the paper's distortions, the loader 'folder', 224 and 0. Raises `ConfigError`
    for a bad recipe and `DataError` for a dataset that cannot be read or a file that cannot be written.
    """
    _check_out(out)
    if recipe:
        run = load_config(recipe, [f"data.path={dataset}"])
        data, seed = run.data, run.seed if seed is None else seed
    else:
        data, seed = DataConfig(path=dataset, loader="folder", workers=0), seed or 0
    data = data.model_copy(update={"image_size": size or data.image_size})
    shown = load_views(data, seed, epoch, num_images)
    title = f"{'/'.join(dataset.parts[-2:])}, {data.image_size} pixels, loader {data.loader}, "
    png = views_png(shown, title + f"seed {seed}, epoch {epoch}")
    try:
        write_atomically(out, lambda file: file.write(png))
    except OSError as error:
        raise DataError(f"Cannot write {out}: {error.strerror}; choose another place.") from error
    return len(shown.images)


@dataclass(frozen=True)
class ShownViews:
    """The first images of an epoch, and their views as the step gets them, but for the normalisation."""

    images: list[np.ndarray]  # uint8 (H, W, 3), each of its own size
    names: list[str]
    views_VNHWC: np.ndarray  # uint8
    params: ViewParams


def load_views(data: DataConfig, seed: int, epoch: int, num_images: int) -> ShownViews:
    """The first `num_images` images of `epoch` in training's order, or all if there are fewer.

    Raises `DataError` where the dataset or an image of it cannot be read, and for the synthetic loader.
    """
    if data.loader == "synthetic":
        raise DataError("The loader 'synthetic' shows no images; set data.loader to folder, ffcv or dali.")
    source = open_source(data.path)
    num_images = min(num_images, len(source))
    with closing(build_loader(data, seed=seed, batch_size=num_images)) as loader:
        batch = next(iter(loader.epoch(epoch)))
    anywhere = data.augment.model_copy(update={"implementation": "auto"})  # also a GPU's recipe on a CPU
    distorted = distort(batch.views_VNHWC, batch.params, anywhere, torch.float32)
    indices, labels = batch.indices_N.tolist(), batch.labels_N.tolist()
    return ShownViews(
        images=[np.asarray(read_image(source, index)) for index in indices],
        names=[
            f"{source.classes[label] if source.classes else 'unlabelled'}, sample {index}"
            for index, label in zip(indices, labels, strict=True)
        ],
        views_VNHWC=to_pixels(distorted, data.augment),
        params=batch.params,
    )


def to_pixels(views_VNCHW: Tensor, config: AugmentConfig) -> np.ndarray:
    """Undo the normalisation: uint8 (V, N, H, W, C)."""
    mean_C, std_C = torch.tensor(config.mean), torch.tensor(config.std)
    levels_VNHWC = 255 * (views_VNCHW.permute(0, 1, 3, 4, 2) * std_C + mean_C)
    return levels_VNHWC.round().clamp(0, 255).to(torch.uint8).numpy()


def describe_view(params: ViewParams, view: int, sample: int, image_size: tuple[int, int]) -> list[str]:
    """What was drawn, a line for each operation in the order in which they are applied."""
    of = {name: value[view, sample].tolist() for name, value in vars(params).items()}
    top, left, height, width = of["box_VN4"]
    share = height * width / (image_size[0] * image_size[1])
    lines = [f"crop {width} x {height} at ({left}, {top}),", f"{share:.0%} of the image"]
    if of["flip_VN"]:
        lines.append("flipped")
    if of["jitter_VN"]:
        jitter = (
            f"brightness x {of['brightness_VN']:.2f}",
            f"contrast x {of['contrast_VN']:.2f}",
            f"saturation x {of['saturation_VN']:.2f}",
            f"hue {360 * of['hue_VN']:+.0f} degrees",
        )
        lines += [jitter[operation] for operation in of["order_VN4"]]
    if of["grayscale_VN"]:
        lines.append("grayscale")
    if of["blur_VN"] > 0:
        lines.append(f"blur, sigma {of['blur_VN']:.2f} px")
    if of["solarize_VN"]:
        lines.append("solarized")
    return lines


def views_png(shown: ShownViews, title: str) -> bytes:
    """The picture: a row per image, with the crop boxes drawn into it."""
    from matplotlib.figure import Figure

    num_images = len(shown.images)
    height = 2 * MARGIN + HEADER + num_images * (SIDE + 2 * GAP) - GAP
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH)

    def say(x: float, y: float, text: str, **style: object) -> None:
        """Text whose top left corner is x and y inches from that of the picture."""
        figure.text(x / WIDTH, 1 - y / height, text, va="top", parse_math=False, **style)

    say(MARGIN, MARGIN, title, fontsize=12, color=INK)
    for n, (image, name) in enumerate(zip(shown.images, shown.names, strict=True)):
        y = MARGIN + HEADER + n * (SIDE + 2 * GAP)
        say(MARGIN, y - GAP, shorten(name, 38, placeholder="..."), fontsize=8, color=MUTED)
        axes = _picture(figure, MARGIN, y, image)
        x = MARGIN + SIDE + 2 * GAP
        for v in range(NUM_VIEWS):
            _draw_box(axes, shown.params.box_VN4[v, n].tolist(), VIEW_COLOURS[v])
            say(x, y - GAP, f"view {'ab'[v]}", fontsize=8, color=VIEW_COLOURS[v], weight="bold")
            _picture(figure, x, y, shown.views_VNHWC[v, n])
            lines = describe_view(shown.params, v, n, image.shape[:2])
            say(x + SIDE + 0.1, y, "\n".join(lines), fontsize=8, color=INK, linespacing=1.5)
            x += SIDE + NUMBERS + 2 * GAP
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _check_out(out: Path) -> None:
    """Raise `DataError` where `out` cannot be a picture: before the work, not after it."""
    if out.suffix != ".png":
        raise DataError(f"Cannot write {out}: the name must end in .png.")
    if not out.absolute().parent.is_dir():
        raise DataError(f"Cannot write {out}: there is no folder {out.absolute().parent}; make it first.")


def _picture(figure: "Figure", x: float, y: float, image_HWC: np.ndarray) -> "Axes":
    """The image in a square of `SIDE` inches whose top left corner is x and y inches from the picture's."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, 1 - (y + SIDE) / height, SIDE / width, SIDE / height), anchor="NW")
    axes.imshow(image_HWC)
    axes.set_axis_off()
    return axes


def _draw_box(axes: "Axes", box: list[int], colour: str) -> None:
    from matplotlib.patches import Rectangle

    top, left, height, width = box
    corner = left - 0.5, top - 0.5  # imshow centres the first pixel at 0
    axes.add_patch(
        Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.5, clip_on=False)
    )
