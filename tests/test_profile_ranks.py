"""Several ranks: the slow one is named with the cause, and what the others wait for is communication."""

import socket
from collections.abc import Callable
from functools import partial

import pytest

from tests.ranks.profiled import profile_slow_rank
from tools.profile.result import read_json
from tools.profile.run import Progress
from train.config import RunConfig
from train.launch import launch_ranks

pytestmark = pytest.mark.timeout(300)  # two torch processes, on a machine that may be busy


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., None]) -> RunConfig:
    root = tmp_path_factory.mktemp("ranks")
    write_images(root / "images", ["a", "b"], 8)
    return RunConfig.model_validate(
        {
            "run_dir": str(root / "run"),
            "data": {
                "path": str(root / "images"),
                "loader": "folder",
                "image_size": 16,
                "workers": 0,
                "augment": {"implementation": "torch"},
            },
            "train": {
                "epochs": 1,
                "batch_size": 8,
                "precision": "fp32",
                "device": "cpu",
                "optim": {"warmup_epochs": 0},
            },
        }
    )


@pytest.fixture(scope="module")
def told() -> list[Progress]:
    """What rank 0 tells while `profiles` are made."""
    return []


@pytest.fixture(scope="module")
def profiles(config: RunConfig, told: list[Progress]) -> dict[str, dict]:
    """Of two ranks, the second one slow: by the cause."""
    folder = config.run_dir.parent
    launch_ranks(partial(profile_slow_rank, config, folder), 2, told.append)
    return {cause: read_json(folder / cause / "profile.json") for cause in ("compute", "loader")}


@pytest.mark.parametrize("cause", ["compute", "loader"])
def test_slow_rank_is_named_with_its_host_and_the_true_cause(profiles: dict[str, dict], cause: str) -> None:
    verdict = profiles[cause]["verdict"]
    assert verdict["limit"] == "straggler", verdict["sentence"]
    assert f"Rank 1 on {socket.gethostname()}" in verdict["sentence"]
    assert f"its own {cause}" in verdict["sentence"]
    assert verdict["ratio"] > 1


@pytest.mark.parametrize("cause", ["compute", "loader"])
def test_the_fast_rank_waits_for_the_slow_one_in_collectives(profiles: dict[str, dict], cause: str) -> None:
    fast, slow = profiles[cause]["ranks"]
    assert (fast["rank"], slow["rank"]) == (0, 1)
    assert fast["phases"]["exposed communication"] > slow["phases"]["exposed communication"]
    for rank in (fast, slow):
        assert sum(rank["phases"].values()) == pytest.approx(rank["step_seconds"])
    phase = "forward" if cause == "compute" else "data wait"
    assert slow["phases"][phase] > fast["phases"][phase]
    assert profiles[cause]["run"]["phases"] == fast["phases"]


def test_collectives_are_those_of_the_step_at_their_sizes(profiles: dict[str, dict]) -> None:
    rows = {(row["operation"], row["what"], row["bytes"]): row for row in profiles["compute"]["collectives"]}
    (gradients,) = (row for (_, what, _), row in rows.items() if what == "gradients")
    assert (gradients["bytes"], gradients["count"]) == (4 * (3 * 8 + 8), 1)
    sizes = {size for _, what, size in rows if what == "loss"}
    assert 8 * 2 in sizes  # the numbers of rows of both ranks
    assert all(row["seconds"] > 0 and row["bytes_per_second"] > 0 for row in rows.values())
    assert {what for _, what, _ in rows} == {"gradients", "loss"}


def test_first_rank_tells_of_progress_and_writes_the_files(
    config: RunConfig, profiles: dict[str, dict], told: list[Progress]
) -> None:
    assert [progress.part for progress in told].count("the collectives alone") == 2
    for cause in profiles:
        names = {path.name for path in (config.run_dir.parent / cause).iterdir()}
        traces = {"trace-rank0.json.gz", "trace-rank1.json.gz"}
        assert names == {"profile.json", "report.html", *traces}
