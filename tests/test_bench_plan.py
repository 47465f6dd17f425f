"""The benchmark of the plan: what it profiles, predicts and measures, on a single rank in this process."""

import pytest
import torch
from torchvision.models.resnet import BasicBlock

from model.backbones import BACKBONES
from tools.bench import plan as bench
from tools.bench.figures import figures_of
from tools.bench.plan import bench_plan
from train.config import RunConfig
from train.distributed import World
from train.errors import ConfigError

CONFIG = RunConfig.model_validate(
    {
        "run_dir": "none",
        "data": {"path": "none", "image_size": 24, "augment": {"implementation": "torch"}},
        "model": {"backbone": "resnet18", "projector": "8-16"},
        "train": {"device": "cpu", "precision": "fp32", "batch_size": 4, "optim": {"warmup_epochs": 0}},
    }
)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 1, torch.device("cpu"))
    monkeypatch.setitem(BACKBONES, "resnet18", (BasicBlock, [1, 1, 1, 1]))
    monkeypatch.setattr(bench, "run_ranks", lambda job, ranks, device: [job(world)])
    monkeypatch.setattr(bench, "run_processes", lambda jobs, poll: [job() for job in jobs])


def test_steps_of_other_sizes_are_predicted_from_those_profiled(in_this_process: None) -> None:
    done: list[tuple[int, int]] = []
    result = bench_plan(
        CONFIG, ranks=[1], profiled=[3, 6], pairs=[5], steps=1, progress=lambda *at: done.append(at)
    )
    assert [(row["ranks"], row["pairs_per_rank"], row["loss"]) for row in result["rows"]] == [
        (1, 5, "dense"),
        (1, 5, "gram"),
    ]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["predicted_ms"] / row["measured_ms"])
        assert row["predicted_ms"] == pytest.approx(sum(row["predicted_parts_ms"].values()))
        assert len(row["all_ms"]) == 1 and row["measured_ms"] > 0
        assert row["predicted_parts_ms"].keys() == {"augment", "forward", "loss", "backward", "optimizer"}
    figures = figures_of(result)
    assert [figure.ratio for figure in figures] == [row["ratio"] for row in result["rows"]]
    assert [list(figure.values) for figure in figures] == [row["all_ms"] for row in result["rows"]]
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="pairs 2 or more"):
        bench_plan(CONFIG, pairs=[1])
    half = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"precision": "fp16"})})
    with pytest.raises(ConfigError, match="fp32 or bf16, not fp16"):
        bench_plan(half)
