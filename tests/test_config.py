"""A recipe is read exactly, and a mistake in it is told in one sentence that helps."""

from pathlib import Path

import pytest

from train.config import RunConfig, known_keys, load_config, save_config
from train.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
MINIMAL = "run_dir: runs/x\ndata:\n  path: images\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def sentence(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    assert isinstance(load_config(path), RunConfig)


def test_saved_config_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    overrides = (
        "seed=18446744073709551615",
        "train.optim.weight_decay=1e-6",
        "train.checkpoint.every_steps=7",
        "data.augment.view_b.crop_scale=[0.2, 0.9]",
        "data.augment.std=[0.1234567890123, 0.2, 0.3]",
        "model.projector=64-32",
    )
    config = load_config(recipe, overrides)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_overrides_replace_the_file_and_leave_their_neighbours(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "train:\n  epochs: 50\n  batch_size: 64\n  optim:\n")
    config = load_config(recipe, ["train.epochs=30", "train.optim.lr_weights=0.3", "train.epochs=40"])
    assert (config.train.epochs, config.train.batch_size, config.train.optim.lr_weights) == (40, 64, 0.3)


def test_a_setting_of_the_second_view_leaves_its_other_defaults(recipe: Path) -> None:
    """They are not the first view's."""
    augment = load_config(recipe, ["data.augment.view_b.jitter_p=0.5"]).data.augment
    view_b = augment.view_b
    assert (view_b.jitter_p, view_b.blur_p, view_b.solarize_p) == (0.5, 0.1, 0.2)
    assert (augment.view_a.blur_p, augment.view_a.solarize_p) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("train:\n  epoch: 3\n", "train.epochs"),
        ("train:\n  lr_weights: 0.1\n", "train.optim.lr_weights"),
        ("modle:\n  backbone: resnet18\n", "model"),
        ("train:\n  optim:\n    weightdecay: 0\n", "train.optim.weight_decay"),
    ],
)
def test_unknown_key_in_the_file_names_the_nearest(recipe: Path, text: str, nearest: str) -> None:
    recipe.write_text(MINIMAL + text)
    message = sentence(recipe)
    assert str(recipe) in message and f"'{nearest}'" in message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.epoch=3", "train.epochs"),
        ("trian.epochs=3", "train.epochs"),
        ("batch_size=32", "train.batch_size"),
        ("data.augment.view_a.blur=0", "data.augment.view_a.blur_p"),
    ],
)
def test_unknown_key_in_an_override_names_the_nearest(recipe: Path, override: str, nearest: str) -> None:
    message = sentence(recipe, (override,))
    assert "override" in message and f"'{nearest}'" in message


def test_key_like_no_other_lists_what_its_section_knows(recipe: Path) -> None:
    assert "epochs, max_steps, batch_size" in sentence(recipe, ("train.qqq=1",))
    assert "run_dir, seed, data, model" in sentence(recipe, ("zzz=1",))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=many", ["train.epochs", "integer", "'many'"]),
        ("train.epochs=0", ["train.epochs", "greater than or equal to 1", "0"]),
        ("train.precision=fp8", ["train.precision", "'fp64', 'fp32', 'bf16' or 'fp16'", "'fp8'"]),
        ("model=3", ["model", "backbone, small_stem"]),
        ("model.projector=8192x3", ["model.projector", "8192-8192-8192"]),
        ("data.augment.mean=[0.5]", ["data.augment.mean needs more numbers than [0.5]"]),
        ("train.optim.lr_weights=yes", ["train.optim.lr_weights", "should not be yes or no", "True"]),
        ("train.epochs=true", ["train.epochs", "should not be yes or no"]),
        ("data.augment.view_a.crop_scale=[no, 1]", ["crop_scale", "should not be yes or no"]),
        ("train.optim.lr_weights=.nan", ["train.optim.lr_weights", "finite"]),
        ("data.augment.std=[.inf, 1, 1]", ["data.augment.std.0", "finite"]),
        ("eval.linear.seed=-1", ["eval.linear.seed", "greater than or equal to 0"]),
        ("run_dir=", ["run_dir", "None"]),
        ("data.augment.view_a={crop_scale: [0.5, 0.1]}", ["data.augment.view_a", "ascending"]),
        (
            "data.augment.view_a={crop_scale: [0.5, 1.1]}",
            ["crop_scale must lie within 0 and 1, not 0.5, 1.1"],
        ),
        ("data.augment.view_b={crop_ratio: [0.0009, 1]}", ["crop_ratio must lie within 0.001 and 1000"]),
        ("data.augment.view_b={crop_ratio: [1, 1001]}", ["crop_ratio must lie within 0.001 and 1000"]),
        (
            "data.augment.view_a={blur_sigma: [1, 1e6]}",
            ["blur_sigma must lie within 0 and 12, not 1.0, 1000000"],
        ),
        (
            "data.augment.std=[0.2, 1e-60, 0.2]",
            ["data.augment.std.1", "greater than or equal to 0.001", "1e-60"],
        ),
        ("train.optim={lr_weights: -1}", ["train.optim.lr_weights", "greater than 0"]),
    ],
)
def test_wrong_value_of_an_override_says_what_is_allowed(
    recipe: Path, override: str, words: list[str]
) -> None:
    message = sentence(recipe, (override,))
    assert message.startswith("override: ") and message.endswith(".")
    for word in words:
        assert word in message


def test_the_widest_ranges_are_allowed(recipe: Path) -> None:
    ranges = "{crop_scale: [1e-9, 1], crop_ratio: [1e-3, 1e3], blur_sigma: [1e-9, 12]}"
    augment = load_config(
        recipe, [f"data.augment.view_a={ranges}", "data.augment.std=[1e-3, 1, 9]"]
    ).data.augment
    assert augment.view_a.blur_sigma == (1e-9, 12) and augment.std == (1e-3, 1, 9)


def test_wrong_value_in_the_file_names_the_file(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "train:\n  batch_size: 1\n")
    message = sentence(recipe, ("train.epochs=20",))
    assert message.startswith(f"{recipe}: train.batch_size") and "greater than or equal to 2" in message


def test_booleans_in_the_file_are_no_numbers(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "train:\n  checkpoint: {resume: no}\n  epochs: on\n")
    assert sentence(recipe) == f"{recipe}: train.epochs: Input should not be yes or no, but it is True."


def test_text_that_yaml_takes_for_something_else_stays_text(recipe: Path) -> None:
    for text in ("2024", "2024-05-01", "2024-13-45", "yes", "a: b"):
        assert load_config(recipe, [f"run_dir={text}", f"data.path={text}"]).run_dir == Path(text)
    for quoted in ("'a: b'", '"a: b"'):
        assert load_config(recipe, [f"run_dir={quoted}"]).run_dir == Path("a: b")
    assert load_config(recipe, ["model.projector=8192"]).model.projector_widths == [8192]
    recipe.write_text(MINIMAL + "model: {projector: 512}\n")
    assert load_config(recipe).model.projector_widths == [512]


def test_key_that_comes_twice_is_refused(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "train:\n  epochs: 20\n  epochs: 30\n")
    message = sentence(recipe)
    assert str(recipe) in message and "'epochs' comes twice at line 6, column 3" in message
    recipe.write_text(MINIMAL)
    assert "'eta' comes twice" in sentence(recipe, ("train.optim={eta: 1, eta: 2}",))


def test_missing_key_is_named(recipe: Path) -> None:
    recipe.write_text("data:\n  path: images\n")
    assert "run_dir is missing" in sentence(recipe)


def test_warm_up_must_end_before_the_run(recipe: Path) -> None:
    message = sentence(recipe, ("train.epochs=10",))
    assert message.startswith(f"{recipe} with the overrides: train: ")
    assert "optim.warmup_epochs must be less than epochs" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [1, 2\n", "not valid YAML"),
        (b"a: b: c\n", "line 1"),
        (b"seed: 2024-13-45\n", "month must be in 1..12"),
        (b"- 1\n- 2\n", "mapping"),
        (b"", "mapping"),
        (b"\xff\xfe\x00bad", "UTF-8"),
    ],
)
def test_file_that_is_no_recipe_is_refused(recipe: Path, content: bytes, words: str) -> None:
    recipe.write_bytes(content)
    message = sentence(recipe)
    assert words in message and str(recipe) in message


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in sentence(tmp_path / "none.yaml")
    assert "directory" in sentence(tmp_path)


def test_malformed_overrides_are_refused(recipe: Path) -> None:
    assert "has no '='" in sentence(recipe, ("train.epochs",))
    assert "not valid YAML" in sentence(recipe, ("train.epochs=[1",))
    recipe.write_text(MINIMAL + "train: 5\n")
    assert "train must be a section" in sentence(recipe, ("train.epochs=20",))


def test_known_keys_hold_every_section_and_leaf() -> None:
    keys = known_keys()
    assert {"seed", "train", "train.optim.eta", "data.augment.view_a.blur_sigma"} <= set(keys)
    assert len(keys) == len(set(keys))
