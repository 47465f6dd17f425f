"""`fastbarlow plan` with measured profiles, and as a command: what it says and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.plan_recipes import SMALL, planner, small
from tools.cli import app
from tools.plan.plan import with_train
from train.config import RunConfig


def profile(config: RunConfig, device: str = "NVIDIA H100 80GB HBM3", **changes: Any) -> dict[str, Any]:
    """As `fastbarlow profile` writes it, of one rank with 24 pairs."""
    phases = {
        "data wait": 0.5,
        "augment": 0.01,
        "forward": 0.10,
        "loss": 0.02,
        "backward": 0.20,
        "optimizer": 0.03,
    }
    settings = {
        "backbone": config.model.backbone,
        "projector": config.model.projector,
        "image_size": config.data.image_size,
        "batch_size": 24,
        "micro_batches": 1,
        "precision": config.train.precision,
        "norm": config.model.norm,
        "ranks": 1,
        "loss_algorithm": "gram",
    }
    base = {"environment": {"device": device}, "settings": settings, "run": {"phases": phases}}
    for section, content in changes.items():
        base[section] = {**base.get(section, {}), **content} if isinstance(content, dict) else content
    return base


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_profile_is_reproduced_by_the_plan_of_its_own_setting(tmp_path: Path) -> None:
    config = with_train(small(), batch_size=24)
    path = write(tmp_path / "p.json", profile(config))
    parts = planner(config, 1, profiles=[path]).predict().step.parts
    want = {"augment": 0.01, "forward": 0.10, "loss": 0.02, "backward": 0.20, "optimizer": 0.03}
    assert parts == pytest.approx(want)
    alone = write(
        tmp_path / "alone.json", profile(config, ceilings={"step": {"pairs_per_second": 24 / 0.18}})
    )
    assert planner(config, 1, profiles=[alone]).predict().step.seconds == pytest.approx(0.18)


def test_several_batch_sizes_make_a_line(tmp_path: Path) -> None:
    config = with_train(small(), batch_size=60)
    paths = []
    for N in (20, 40):
        phases = {
            "augment": 1e-4 * N,
            "forward": 0.1 + 0.01 * N,
            "loss": 0.01,
            "backward": 0.02 * N,
            "optimizer": 0.3,
        }
        content = profile(config, run={"phases": phases}, settings={"batch_size": N})
        paths.append(write(tmp_path / f"{N}.json", content))
    parts = planner(config, 1, profiles=paths).predict().step.parts
    assert parts["forward"] == pytest.approx(0.7)
    assert parts["optimizer"] == pytest.approx(0.3)
    assert parts["augment"] == pytest.approx(6e-3)


def test_pieces_of_a_profile_are_taken_apart(tmp_path: Path) -> None:
    """Three pieces of 8: three passes forward, then three back with two forward again."""
    config = with_train(small(), batch_size=8)
    phases = {"augment": 0.03, "forward": 0.3, "loss": 0.01, "backward": 0.8, "optimizer": 0.02}
    content = profile(config, run={"phases": phases}, settings={"micro_batches": 3})
    parts = planner(config, 1, profiles=[write(tmp_path / "p.json", content)]).predict().step.parts
    assert (parts["forward"], parts["backward"]) == pytest.approx((0.1, 0.2))


def test_measured_collectives_give_link_and_latency(tmp_path: Path) -> None:
    config = with_train(small(), batch_size=48)
    collectives = [
        {"operation": "all_reduce", "what": "gradients", "bytes": 8e6, "count": 3, "seconds": 0.004},
        {"operation": "all_reduce", "what": "statistics", "bytes": 64, "count": 20, "seconds": 1e-4},
        {"operation": "all_gather", "what": "statistics", "bytes": 64, "count": 20, "seconds": 1e-4},
    ]
    content = profile(config, settings={"ranks": 2, "batch_size": 48}, collectives=collectives)
    content["run"]["phases"]["exposed communication"] = 0.05
    step = planner(config, 2, profiles=[write(tmp_path / "p.json", content)]).predict().step
    traffic = {(t.what, t.operation): t for t in step.traffic}
    gradients = traffic["gradients", "all_reduce"]
    assert gradients.seconds == pytest.approx(gradients.count * 1e-4 + gradients.sent / 2e9)
    assert step.parts["forward"] == pytest.approx(0.10 - 20 * 1e-4)
    assert step.parts["backward"] == pytest.approx(0.20 - 20 * 1e-4)
    # Between machines nothing of this is known.
    between = planner(config, 16, profiles=[tmp_path / "p.json"]).predict()
    assert between.rates.link_share == 0.65


def test_the_loader_of_a_profile_feeds(tmp_path: Path) -> None:
    config = with_train(small(), batch_size=24)
    ceilings = {"loader": {"pairs_per_second": 300.0, "cores_used": 1.5}}
    path = write(tmp_path / "p.json", profile(config, ceilings=ceilings))
    assert planner(config, 1, profiles=[path]).predict().feed.per_core == 200


# The command


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def test_the_command_says_the_same_in_words_and_in_json(recipe: Path) -> None:
    arguments = ["plan", str(recipe), "--gpus", "4", "--gpu", "a100"]
    words = CliRunner().invoke(app, arguments)
    assert words.exit_code == 0, words.output
    result = CliRunner().invoke(app, [*arguments, "--json"])
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    figures = found["plan"]
    total = sum(found["parts"].values()) + found["data_wait"]
    assert figures["step_seconds"] == pytest.approx(total)
    assert words.stdout.startswith(f"4 x A100, 1 machine: {1000 * total:.1f} ms a step of 96 pairs")
    assert "ImageNet's 1,281,167 images" in words.stdout
    assert [row["gpus"] for row in found["scale"]] == [1, 2, 4, 8, 16, 32]
    assert found["scale"][0]["efficiency"] == 1
    assert all(source for source in found["sources"].values())


def test_wrong_input_is_refused_in_a_sentence(recipe: Path, tmp_path: Path) -> None:
    def refuse(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["plan", str(recipe), *map(str, arguments)])
        assert result.exit_code == 2, result.output
        (sentence,) = result.stderr.splitlines()
        assert sentence.endswith(".")
        return sentence

    config = small()
    assert "no figures of a GPU 'v101'; choose from a10, a100" in refuse("--gpu", "v101")
    assert "--link must be" in refuse("--link", "-3")
    assert "--link must be" in refuse("--link", "nan")
    assert "1 GPU or more" in refuse("--gpus", "0")
    assert "at least 1, not 0" in refuse("--cores", "0")
    assert "take 4 GPUs, or a batch of 95" in refuse("--gpus", "5")
    assert "lacks bfloat16" in refuse("--gpu", "v100")
    assert "micro_batches must divide the 12 pairs" in refuse("--gpus", "8", "train.micro_batches=8")
    assert "fp64" in refuse("train.precision=fp64", "train.device=cpu")
    assert "64 for 96 GPUs" in refuse("--gpus", "96", "model.loss.algorithm=sharded")
    for name, content, words in (
        ("other", profile(config, settings={"backbone": "resnet50"}), "is of backbone resnet50"),
        ("size", profile(config, settings={"image_size": 224}), "is of image_size 224"),
        ("gpu", profile(config, device="NVIDIA A100-SXM4-80GB"), "made on A100, but the plan is for H100"),
        ("none", {"phases": {}}, "lacks what a plan needs"),
        ("list", [1], "lacks what a plan needs"),
        ("zero", profile(config, run={"phases": {"forward": 0}}), "lacks what a plan needs"),
    ):
        assert words in refuse("--profile", write(tmp_path / f"{name}.json", content))
    (tmp_path / "text.json").write_text("not json")
    assert "not the JSON of a profile" in refuse("--profile", tmp_path / "text.json")
    assert "cannot be read" in refuse("--profile", tmp_path / "absent.json")
