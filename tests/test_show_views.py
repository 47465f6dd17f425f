"""The picture shows the pixels that the trainer sees and the numbers that were drawn for them."""

import dataclasses
import io
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipelines.augment import distort
from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig, DataConfig, ViewConfig
from pipelines.errors import DataError
from pipelines.loaders import build_loader
from pipelines.source import open_source, read_image
from tools.cli import app
from tools.show_views import describe_view, load_views, show_views, views_png

AUGMENT = AugmentConfig(view_b=ViewConfig(blur_p=0.1, solarize_p=0.5), implementation="torch")


def config(path: Path, loader: str = "folder", **settings: object) -> DataConfig:
    return DataConfig(path=path, loader=loader, image_size=41, workers=0, augment=AUGMENT, **settings)


def call(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of `fastbarlow show-views`."""
    result = CliRunner().invoke(app, ["show-views", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.stderr


@pytest.mark.parametrize("loader", ["folder", "dali"])
def test_views_are_what_the_trainer_gets(loader: str, beton: Path) -> None:
    """The same samples out of a larger batch, with the normalisation undone, in 8 bits."""
    shown = load_views(config(beton, loader), seed=3, epoch=2, num_images=5)
    with closing(build_loader(config(beton, loader), seed=3, batch_size=12)) as trainer:
        batch = next(trainer.epoch(2))
    views_VNCHW = distort(batch.views_VNHWC, batch.params, AUGMENT, torch.float32)[:, :5]
    assert shown.views_VNHWC.shape == (2, 5, 41, 41, 3)
    for channel, (mean, std) in enumerate(zip(AUGMENT.mean, AUGMENT.std, strict=True)):
        levels = (views_VNCHW[:, :, channel].double() * std + mean) * 255
        assert np.abs(shown.views_VNHWC[..., channel] - levels.numpy()).max() <= 0.5 + 1e-4
    for name, numbers in vars(shown.params).items():
        assert torch.equal(numbers, getattr(batch.params, name)[:, :5]), name
    source = open_source(beton)
    for image, name, index in zip(shown.images, shown.names, batch.indices_N.tolist(), strict=False):
        assert name.endswith(f"sample {index}")
        np.testing.assert_array_equal(image, read_image(source, index))


def test_a_recipe_for_a_gpu_is_shown_on_the_cpu(beton: Path) -> None:
    expected = load_views(config(beton), 0, 0, 3)
    on_gpu = AUGMENT.model_copy(update={"implementation": "triton"})
    shown = load_views(config(beton).model_copy(update={"augment": on_gpu}), 0, 0, 3)
    np.testing.assert_array_equal(shown.views_VNHWC, expected.views_VNHWC)


def pixels(png: Path) -> np.ndarray:
    with Image.open(png) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_picture_grows_by_a_row_per_image(image_folder: Path, tmp_path: Path) -> None:
    shapes = []
    for images in (1, 2, 3):
        assert call(image_folder, "--out", tmp_path / "v.png", "--images", images, "--size", 33) == (0, "")
        shapes.append(pixels(tmp_path / "v.png").shape)
    heights, widths, _ = zip(*shapes, strict=True)
    assert set(widths) == {1209}
    assert {b - a for a, b in pairwise(heights)} <= {268, 269}  # 2.4 inches


def test_picture_holds_the_views_and_the_boxes(beton: Path) -> None:
    """Views of one colour each are found as squares of that colour."""
    shown = load_views(config(beton), 0, 0, 2)
    colours = np.array([[(200, 30, 90), (10, 140, 60)], [(90, 90, 10), (20, 20, 200)]], np.uint8)
    views = np.broadcast_to(colours[:, :, None, None], shown.views_VNHWC.shape)
    png = views_png(dataclasses.replace(shown, views_VNHWC=views), "a title")
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    for colour in colours.reshape(-1, 3):
        rows, columns = (picture == colour).all(-1).nonzero()
        assert abs(np.ptp(rows) - 224) <= 2 and abs(np.ptp(columns) - 224) <= 2
        assert len(rows) >= 222 * 222
    for box_colour in ((0x25, 0x63, 0xAB), (0xD5, 0x5E, 0x00)):
        assert (picture == box_colour).all(-1).sum() > 200


def test_everything_drawn_is_told_in_the_order_of_its_application() -> None:
    reals = {"brightness": 1.213, "contrast": 0.6, "saturation": 1.0, "hue": -0.1, "blur": 1.456}
    switches = dict.fromkeys(("flip", "jitter", "grayscale", "solarize"), True)
    params = ViewParams(
        box_VN4=torch.tensor([[[5, 7, 30, 40]]]),
        order_VN4=torch.tensor([[[3, 0, 2, 1]]], dtype=torch.uint8),
        **{f"{name}_VN": torch.tensor([[value]]) for name, value in (reals | switches).items()},
    )
    assert describe_view(params, 0, 0, (60, 80)) == [
        "crop 40 x 30 at (7, 5),",
        "25% of the image",
        "flipped",
        "hue -36 degrees",
        "brightness x 1.21",
        "saturation x 1.00",
        "contrast x 0.60",
        "grayscale",
        "blur, sigma 1.46 px",
        "solarized",
    ]
    nothing = {f"{name}_VN": torch.tensor([[False]]) for name in switches} | {
        "blur_VN": torch.tensor([[0.0]])
    }
    assert len(describe_view(dataclasses.replace(params, **nothing), 0, 0, (60, 80))) == 2


def test_recipe_gives_distortions_loader_size_and_seed(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def record(data: DataConfig, *numbers: int) -> None:
        asked.append((data, *numbers))
        raise DataError("Seen.")

    monkeypatch.setattr("tools.show_views.load_views", record)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "run_dir: r\nseed: 6\ndata: {path: x, loader: dali, image_size: 32, augment: {view_a: {hue: 0.3}}}\n"
    )
    out = tmp_path / "v.png"
    assert call(beton, "--out", out, "--config", recipe) == (2, "Seen.\n")
    assert call(beton, "--out", out, "--config", recipe, "--seed", 0, "--size", 48, "--epoch", 4)[0] == 2
    assert call(beton, "--out", out, "--images", 3)[0] == 2
    (by_recipe, *numbers), (changed, *others), (plain, *defaults) = asked
    assert (by_recipe.path, by_recipe.loader, by_recipe.image_size) == (beton, "dali", 32)
    assert by_recipe.augment.view_a.hue == 0.3
    assert (numbers, others, defaults) == ([6, 0, 8], [0, 4, 8], [0, 0, 3])
    assert (changed.image_size, changed.augment) == (48, by_recipe.augment)
    assert (plain.loader, plain.image_size, plain.augment) == ("folder", 224, AugmentConfig())


def test_fewer_images_than_asked_for_are_all_shown(image_folder: Path, tmp_path: Path) -> None:
    assert show_views(image_folder, tmp_path / "v.png", num_images=64, size=16) == 24


def test_names_with_signs_of_formulas_are_drawn_as_they_are(beton: Path) -> None:
    shown = load_views(config(beton), 0, 0, 1)
    assert views_png(dataclasses.replace(shown, names=["$\\frac{$, a very long name" * 9]), "$x_$ 5$")


def test_bad_input_gets_one_sentence(image_folder: Path, beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.png"
    recipe = tmp_path / "recipe.yaml"

    def refuse(*arguments: object) -> str:
        code, sentence = call(*arguments)
        assert code == 2 and sentence.endswith(".\n") and sentence.count("\n") == 1
        return sentence

    assert "no dataset at" in refuse(tmp_path / "nowhere", "--out", out)
    assert "must end in .png" in refuse(beton, "--out", tmp_path / "v.jpg")
    assert "no folder" in refuse(beton, "--out", tmp_path / "no" / "v.png")
    (tmp_path / "folder.png").mkdir()
    assert "Cannot write" in refuse(
        image_folder, "--out", tmp_path / "folder.png", "--images", 1, "--size", 8
    )
    assert "Cannot read the config" in refuse(beton, "--out", out, "--config", recipe)
    recipe.write_text("run_dir: r\ndata: {loader: ffcv, workers: 1}\n")
    assert "reads .beton files" in refuse(image_folder, "--out", out, "--config", recipe)
    recipe.write_text("run_dir: r\ndata: {loader: synthetic}\n")
    assert "'synthetic' shows no images" in refuse(beton, "--out", out, "--config", recipe)
    cut = tmp_path / "cut.beton"
    cut.write_bytes(beton.read_bytes()[:9000])
    assert str(cut) in refuse(cut, "--out", out)
    assert not out.exists()


def test_command_has_a_manual_page() -> None:
    text = CliRunner().invoke(app, ["show-views", "--help"]).stdout
    assert "Usage: " in text and "Examples" in text
