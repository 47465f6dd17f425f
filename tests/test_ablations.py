"""Each recipe of configs/ablations is the paper's run for 300 epochs with exactly its distortions off."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.draw import draw_views
from train.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
SWITCHED_OFF = {
    "baseline": [],
    "no_jitter": ["jitter"],
    "no_colour": ["jitter", "grayscale"],
    "crop_and_flip": ["jitter", "grayscale", "blur", "solarize"],
    "crop_only": ["jitter", "grayscale", "blur", "solarize", "flip"],
}


def test_every_recipe_of_the_folder_is_known() -> None:
    assert {path.stem for path in (CONFIGS / "ablations").glob("*")} == SWITCHED_OFF.keys()


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_recipe_differs_from_the_papers_run_in_nothing_else(name: str) -> None:
    overrides = ["train.epochs=300", "data.workers=8", f"run_dir=runs/ablations/{name}"]
    overrides += [f"data.augment.view_b.{setting}" for setting in ("blur_p=0.1", "solarize_p=0.2")]
    for operation in SWITCHED_OFF[name]:
        overrides += [f"data.augment.view_{view}.{operation}_p=0" for view in "ab"]
    expected = load_config(CONFIGS / "imagenet_rn50_8xh100.yaml", overrides)
    assert load_config(CONFIGS / "ablations" / f"{name}.yaml") == expected


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_what_is_switched_off_is_never_drawn(name: str) -> None:
    views = load_config(CONFIGS / "ablations" / f"{name}.yaml").data.augment.views
    params = draw_views(views, 0, 0, np.arange(200), np.full(200, 375), np.full(200, 500))
    for operation in ("jitter", "grayscale", "blur", "solarize", "flip"):
        drawn = (getattr(params, f"{operation}_VN") > 0).any()
        assert drawn == (operation not in SWITCHED_OFF[name]), operation
    assert (params.box_VN4[0] != params.box_VN4[1]).any(dim=1).all()


def test_header_gives_the_command_that_runs_the_recipe() -> None:
    for name in SWITCHED_OFF:
        text = (CONFIGS / "ablations" / f"{name}.yaml").read_text(encoding="utf-8")
        assert f"#   fastbarlow pretrain configs/ablations/{name}.yaml\n" in text
        assert all(f"# {word}:" in text for word in ("Hardware", "Time", "Accuracy"))
