"""`train.initial_weights` starts a new run from trained weights, and has no part in one that goes on."""

import logging
from pathlib import Path

import pytest
import torch

from model.errors import ModelError
from model.twin import Twin
from tools.export import export_backbone
from train.config import RunConfig
from train.distributed import World
from train.errors import TrainingError
from train.initial_weights import load_initial_weights
from train.loop import build_twin, pretrain


def configure(run_dir: Path, steps: int = 1, **settings: object) -> RunConfig:
    """A run whose first step has a learning rate of 0, and so leaves its parameters as they were."""
    seed = settings.pop("seed", 1)
    train = {"max_steps": steps, "batch_size": 4, "precision": "fp32", "device": "cpu", **settings}
    return RunConfig.model_validate(
        {
            "run_dir": run_dir,
            "seed": seed,
            "data": {"path": "none", "loader": "synthetic", "image_size": 16},
            "model": {"backbone": "resnet18", "projector": "4-4"},
            "train": train,
        }
    )


def parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint, weights_only=True)["model"]
    return {name: value for name, value in state.items() if "running" not in name and "num_b" not in name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two steps."""
    return pretrain(configure(tmp_path_factory.mktemp("trained"), steps=2)).checkpoint


def test_run_starts_from_a_checkpoint_and_goes_on_without_it(trained: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.pt"
    given.write_bytes(trained.read_bytes())
    config = configure(tmp_path / "run", seed=2, initial_weights=given)
    result = pretrain(config)
    assert (result.step, result.steps_done) == (1, 1)
    found, expected = parameters(result.checkpoint), parameters(trained)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    counters = torch.load(result.checkpoint, weights_only=True)["model"]
    assert counters["backbone.bn1.num_batches_tracked"] == 2 * (2 + 1)  # statistics are taken over, too

    given.unlink()
    on = configure(tmp_path / "run", steps=2, seed=2, initial_weights=given)
    assert pretrain(on).steps_done == 1
    with pytest.raises(TrainingError, match=r"was trained with train\.initial_weights="):
        pretrain(configure(tmp_path / "run", steps=3, seed=2, initial_weights=trained))


def test_backbone_alone_leaves_the_projector_as_drawn_and_says_so(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_backbone(trained, tmp_path / "backbone.pth")
    with caplog.at_level(logging.WARNING):
        path = tmp_path / "backbone.pth"
        config = configure(tmp_path / "run", seed=2, initial_weights=path)
        checkpoint = pretrain(config).checkpoint
    assert f"{path} holds a backbone alone; the projector starts from random weights." in caplog.messages
    of_backbone, of_projector = parameters(trained), build_twin(config, torch.device("cpu")).state_dict()
    for name, value in parameters(checkpoint).items():
        origin = of_backbone if name.startswith("backbone.") else of_projector
        assert torch.equal(value, origin[name])


def test_weights_that_do_not_fit_are_told_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no.pt", "there is no such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ModelError, match=f"Cannot read the weights {path}: {words}"):
            pretrain(configure(tmp_path / "run", initial_weights=path))
    config = configure(tmp_path / "run", initial_weights=trained)
    wider = config.model_copy(update={"model": config.model.model_copy(update={"projector": "4-8"})})
    with pytest.raises(ModelError, match=r"widths 4-4, but model\.projector is 4-8"):
        pretrain(wider)
    assert not (tmp_path / "run").exists()


def test_ranks_that_find_different_weights_are_told(trained: Path) -> None:
    class OtherWorld(World):
        def gather(self, value: object) -> list:
            return [value, [number + 1 for number in value]]

    config = configure(Path("none"), initial_weights=trained)
    with pytest.raises(TrainingError, match=r"find different weights in train\.initial_weights"):
        load_initial_weights(Twin(config.model), config, OtherWorld(0, 2, torch.device("cpu")))
