"""One table of all benchmarks: figures that a benchmark has measured, with spread and ratio."""

import csv
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from tools.bench import all as bench
from tools.bench.all import Workload, add_rows, bench_all, write_header
from tools.bench.figures import Figure
from train.config import RunConfig
from train.errors import ConfigError, TrainingError

CONFIG = RunConfig.model_validate(
    {
        "run_dir": "none",
        "data": {"path": "none", "image_size": 24},
        "model": {"backbone": "resnet18", "projector": "8-16"},
        "train": {"device": "cpu", "precision": "fp32", "epochs": 20, "batch_size": 4},
    }
)
LOAD = Workload(CONFIG, repeats=2, loss_samples=(6,))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "images"
    write_images(folder, ["a", "b"], per_class=4)
    return folder


def test_a_benchmark_runs_as_the_recipe_says_and_its_result_is_handed_over(images: Path) -> None:
    results: list[dict] = []
    begun: list[str] = []
    assert bench_all(LOAD, images, ["loss"], on_bench=begun.append, on_result=results.append) == {}
    assert begun == [result["bench"] for result in results] == ["loss"]
    assert {(row["n"], row["d"], row["dtype"], len(row["all_ms"])) for row in results[0]["rows"]} == {
        (6, 16, "fp32", 2)
    }


def test_table_has_percentiles_ratio_and_machine(tmp_path: Path) -> None:
    out, machine = tmp_path / "results.csv", {"device": "CPU, of some kind", "torch": "2"}
    write_header(out, machine)
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    add_rows(out, [Figure("loss", "gram, N 6", "ms", values, 2.5, "authors")], machine)
    add_rows(out, [Figure("step", "ours", "pairs/s", [7.0])], machine)
    first, second = csv.DictReader(out.open())
    assert (first["p10"], first["median"], first["p90"], first["repeats"]) == ("1.4", "3", "4.6", "5")
    assert float(first["median"]) == median(values)
    assert (first["times as fast"], first["as"], first["device"]) == ("2.5", "authors", machine["device"])
    assert (second["p10"], second["p90"], second["times as fast"], second["repeats"]) == ("7", "7", "", "1")


def test_a_benchmark_that_cannot_run_here_is_named_and_the_others_go_on(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> dict:
        raise ConfigError("No such thing here.")

    monkeypatch.setattr(bench, "BENCHES", {"first": fails, "second": lambda *arguments: {"bench": "second"}})
    results: list[dict] = []
    assert bench_all(LOAD, images, on_result=results.append) == {"first": "No such thing here."}
    assert results == [{"bench": "second"}]


def test_unknown_names_and_places_are_refused_before_anything_runs(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no benchmark 'lss'; choose from loader"):
        bench_all(LOAD, images, ["lss"])
    with pytest.raises(TrainingError, match=r"--out\.$"):
        write_header(tmp_path / "none" / "results.csv", {})
