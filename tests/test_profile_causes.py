"""Profiles of runs whose bottleneck is known, as a new user would meet them: the verdict names it.

What is slow sleeps, far longer than anything else takes; the network costs next to nothing.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines import sample_reader
from pipelines.source import FolderSource
from tests.ranks.profiled import delayed, profile_tiny
from tools.bench import loader_stages
from tools.profile import run
from train.config import RunConfig

CORES = 4
SLOW_SECONDS = 0.06  # for an image


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("causes")
    write_images(root / "images", ["a", "b"], 4)
    return root / "images"


@pytest.fixture
def config(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda process: set(range(CORES)))
    return RunConfig.model_validate(
        {
            "run_dir": tmp_path / "run",
            "data": {
                "path": images,
                "loader": "folder",
                "image_size": 16,
                "workers": 1,
                "augment": {"implementation": "torch"},
                "prefetch": 1,
            },
            "train": {
                "epochs": 1,
                "batch_size": 4,
                "precision": "fp32",
                "device": "cpu",
                "optim": {"warmup_epochs": 0},
            },
        }
    )


def test_one_worker_that_cannot_decode_fast_enough(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_reader, "read_image", delayed(sample_reader.read_image, SLOW_SECONDS))
    monkeypatch.setattr(loader_stages, "decode", delayed(loader_stages.decode, SLOW_SECONDS))
    verdict = profile_tiny(config, tmp_path)["verdict"]
    assert verdict["limit"] == "decode", verdict["sentence"]
    assert verdict["change"].startswith("data.workers="), verdict["sentence"]
    assert 1 < int(verdict["change"].partition("=")[2]) <= CORES
    assert verdict["ratio"] > 1


def test_a_step_that_is_slower_than_the_loader(config: RunConfig, tmp_path: Path) -> None:
    result = profile_tiny(config, tmp_path, seconds_of_step=4 * SLOW_SECONDS)
    assert result["verdict"]["limit"] == "step", result["verdict"]["sentence"]
    assert "forward" in result["verdict"]["sentence"]


def test_a_slow_disk(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = FolderSource.encoded

    def read_slowly(source: FolderSource, index: int) -> np.ndarray:
        found = encoded(source, index)
        time.sleep(1e-5 * found.nbytes)  # 100 kB/s
        return found

    monkeypatch.setattr(FolderSource, "encoded", read_slowly)
    result = profile_tiny(config, tmp_path)
    assert result["verdict"]["limit"] == "read", result["verdict"]["sentence"]
    assert result["ceilings"]["read"]["bytes_per_second"] <= 1e5
    assert "faster disk" in result["verdict"]["sentence"]
