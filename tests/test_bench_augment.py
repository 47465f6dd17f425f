"""The benchmark of the distortions compares with the right thing, and measures work that is done."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipelines.augment.reference import distort_one
from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig, ViewConfig
from pipelines.draw import draw_views
from tools.bench import augment as bench
from tools.bench.augment import Variant, bench_augment, draw_photographs
from tools.bench.augment_peers import authors_transform, kornia, torchvision_v2
from tools.cli import app

CPU = torch.device("cpu")
FIELDS = {"implementation", "views_px", "dtype", "device", "repeats", "all_pairs_per_second"}
FIELDS |= {"pairs_per_second", "us_per_view", "ratio_to_authors", "timed"}
ON_CPU = [("authors", "fp32"), *((name, dtype) for name in ("torch", "numba") for dtype in ("fp32", "bf16"))]


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And few processes of the authors' transform."""
    monkeypatch.setattr(bench, "TURN_S", 0.01)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    yield
    torch.set_num_threads(threads)


def test_every_implementation_has_a_row_with_all_fields(
    short_turns: None, image_folder: Path, check_figures: Callable[[dict, int], None]
) -> None:
    options = ["--size", 33, "--batch", 5, "--repeats", 3, "--images", image_folder, "--device", "cpu"]
    printed = CliRunner().invoke(app, ["bench", "augment", *map(str, options), "--json"])
    assert printed.exit_code == 0, printed.output
    result = json.loads(printed.stdout.splitlines()[-1])
    check_figures(result, 3)
    rows = result["rows"]
    assert [(row["implementation"], row["dtype"]) for row in rows] == ON_CPU
    for row in rows:
        assert row.keys() == FIELDS
        assert (row["views_px"], row["device"], row["repeats"]) == (33, "cpu", 3)
        assert row["timed"] == "wall clock"
        rates = row["all_pairs_per_second"]
        assert len(rates) == 3 and min(rates) > 0
        assert row["pairs_per_second"] == median(rates)
        assert row["us_per_view"] == pytest.approx(1e6 / (2 * median(rates)))
        ratios = [a / b for a, b in zip(rates, rows[0]["all_pairs_per_second"], strict=True)]
        assert row["ratio_to_authors"] == pytest.approx(median(ratios))
    assert (result["batch"], result["images"]) == (5, str(image_folder))
    assert result["unavailable"] == {"triton": "serves CUDA devices only"}
    assert result["load_average"] >= 0 and result["environment"]["device"] == "CPU"


def test_more_pairs_than_images_are_refused_in_one_sentence(image_folder: Path) -> None:
    options = ["--batch", "25", "--size", "32", "--images", str(image_folder), "--device", "cpu"]
    result = CliRunner().invoke(app, ["bench", "augment", *options])
    assert result.exit_code == 2
    (sentence,) = result.stderr.splitlines()
    assert sentence.endswith(".") and "25" in sentence


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_authors_transform_is_the_reference(p: float) -> None:
    """With nothing left to chance: all distortions but the jitter, which has chance in its order, or none."""
    view = ViewConfig(flip_p=p, jitter_p=0, grayscale_p=p, blur_p=p, blur_sigma=(1.3, 1.3), solarize_p=p)
    config = AugmentConfig(view_a=view, view_b=view)
    image = draw_photographs(1, 33)[0, 0].numpy()
    params = draw_views(config.views, 0, 0, np.arange(1), np.array([33]), np.array([33]))
    expected = distort_one(image, params, 0, 0, config)
    torch.testing.assert_close(authors_transform(view, config)(Image.fromarray(image)), expected)


def test_the_authors_transform_jitters_as_configured() -> None:
    view = ViewConfig(brightness=0.4, contrast=0, saturation=0, hue=0, jitter_p=1, flip_p=0, blur_p=0)
    gray_levels = AugmentConfig(mean=(0, 0, 0), std=(1 / 255,) * 3)
    transform = authors_transform(view.model_copy(update={"grayscale_p": 0}), gray_levels)
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    levels = {round(transform(image).mean().item()) for _ in range(50)}
    assert 60 <= min(levels) < 80 and 120 < max(levels) <= 140


def test_torchvision_per_sample_does_the_same_work() -> None:
    views_VNCHW = draw_photographs(3, 33).permute(0, 1, 4, 2, 3).contiguous()
    both = torchvision_v2(views_VNCHW, AugmentConfig())()
    assert [[image.shape for image in view] for view in both] == [[(3, 33, 33)] * 3] * 2
    assert all(image.dtype == torch.float32 for view in both for image in view)
    means = bench._sums(both) / (3 * 33 * 33)
    assert means.shape == (2, 3) and (means.abs() < 3).all()


def test_kornia_does_the_same_work() -> None:
    pytest.importorskip("kornia")
    views_VNCHW = draw_photographs(3, 33).permute(0, 1, 4, 2, 3).contiguous()
    both = kornia(views_VNCHW, AugmentConfig())()
    assert [(view.shape, view.dtype) for view in both] == [((3, 3, 33, 33), torch.float32)] * 2
    assert (bench._sums(both).abs() < 3 * 3 * 33 * 33).all()


def test_work_that_is_not_done_is_not_measured() -> None:
    images = torch.rand(2, 4, 3, 8, 8)
    numbers = count()

    def first_image_only() -> torch.Tensor:
        images[0, 0] = next(numbers)
        return images.clone()

    def not_finite() -> torch.Tensor:
        return torch.rand(2, 4, 3, 8, 8).log_().div_(0)

    for run, complaint in ((first_image_only, "hardly any"), (not_finite, "not finite")):
        with pytest.raises(RuntimeError, match=complaint):
            bench._check(Variant("ours", "fp32", CPU, run))
    bench._check(Variant("ours", "fp32", CPU, lambda: torch.rand(2, 4, 3, 8, 8)))


def test_ours_draw_new_numbers_for_every_pass() -> None:
    seen: list[ViewParams] = []

    def distort(views_VNHWC: torch.Tensor, params: ViewParams, *_: object) -> torch.Tensor:
        seen.append(params)
        return views_VNHWC

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "IMPLEMENTATIONS", {"numba": lambda: distort})
        single, half = bench._ours(draw_photographs(4, 8), AugmentConfig(), CPU, {})
    for variant in (single, half):
        seen.clear()
        variant.run(), variant.run()
        assert not torch.equal(seen[0].blur_VN, seen[1].blur_VN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_rows_state_the_traffic() -> None:
    result = bench_augment(torch.device("cuda"), size=64, batch=64, repeats=2)
    for row in result["rows"]:
        if row["device"] == "cpu":
            assert row["implementation"] == "authors"
            continue
        assert row["timed"] == "GPU events"
        assert row["floor_bytes_per_view"] == 3 * 64**2 * (5 if row["dtype"] == "fp32" else 3)
        assert row["memory_floor_share"] > 0
        if row["implementation"] == "triton":
            assert row["planned_bytes_per_view"] > row["floor_bytes_per_view"]
    assert {"triton", "torch", "torchvision v2 per sample"} <= {r["implementation"] for r in result["rows"]}
