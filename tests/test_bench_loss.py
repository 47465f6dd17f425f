"""The benchmark of the loss compares with the right thing, and its meters tell the truth."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from model.config import LossConfig
from model.loss.plan import Hardware, estimate
from model.loss.reference import reference_loss
from pipelines.errors import DataError
from tools.bench import loss_measure as bench
from tools.bench.authors import AuthorsLoss
from tools.bench.loss import bench_loss
from tools.bench.loss_measure import AUTHORS, Task, measure, measure_peaks
from tools.bench.loss_table import as_markdown, loss_tables
from tools.bench.ranks import run_ranks as on_ranks
from tools.cli import app
from train.distributed import World
from train.errors import ConfigError

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
SLACK_BYTES = 1_000_000  # of resident memory: the kernel keeps its counters in batches of pages
ROW_FIELDS = {"n", "d", "world", "dtype", "device", "algorithm", "implementation", "repeats"}
ROW_FIELDS |= {"ms", "ms_authors", "speedup", "products_ms", "over_products"}
ROW_FIELDS |= {"peak_bytes", "peak_bytes_authors", "grad_rel_err", "grad_rel_err_authors"}
ROW_FIELDS |= {"all_ms", "all_ms_authors", "all_products_ms"}


@pytest.mark.parametrize(("n", "width"), [(2, 3), (17, 5), (12, 29)])
def test_the_authors_formulation_is_the_definition(n: int, width: int) -> None:
    generator = torch.Generator().manual_seed(n)
    views = [torch.randn(n, width, generator=generator).double().requires_grad_() for _ in range(2)]
    authors = AuthorsLoss(width, n, 0.03, CPU).double()(*views)
    truth, *_ = reference_loss(*views, LossConfig(off_diagonal_weight=0.03))
    torch.testing.assert_close(authors, truth, rtol=1e-12, atol=0)
    gradients, expected = torch.autograd.grad(authors, views), torch.autograd.grad(truth, views)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def check_rows(result: dict, samples: list[int], algorithms: list[str], world: int) -> None:
    assert [(row["n"], row["algorithm"]) for row in result["rows"]] == [
        (n, algorithm) for n in samples for algorithm in algorithms
    ]
    for row in result["rows"]:
        assert row.keys() >= ROW_FIELDS
        assert (row["world"], row["repeats"], len(row["all_ms"])) == (world, 3, 3)
        assert row["ms"] == median(row["all_ms"])
        ratios = [a / b for a, b in zip(row["all_ms_authors"], row["all_ms"], strict=True)]
        assert row["speedup"] == median(ratios)
        assert row["over_products"] == row["ms"] / median(row["all_products_ms"])
        assert 0 < row["grad_rel_err"] < 1e-5
        assert 0 < row["grad_rel_err_authors"] < 1e-5


def test_every_algorithm_has_a_row_with_all_fields(check_figures: Callable[[dict, int], None]) -> None:
    rounds: list[tuple[int, int]] = []
    result = bench_loss(
        [8, 30], 17, repeats=3, device="cpu", progress=lambda done, total: rounds.append((done, total))
    )
    check_rows(result, [8, 30], ["dense", "gram"], world=1)
    check_figures(result, 3)
    assert rounds == [(done, 8) for done in range(1, 9)]
    assert json.loads(json.dumps(result)) == result
    page, tables = as_markdown(result), loss_tables(result)
    for title, rows in tables:
        assert f"## {title}\n" in page
        assert all(f"| {' | '.join(row)} |" in page for row in rows)
    assert result["environment"]["torch"] in page
    assert "gloo" not in page
    for n, rows in zip([8, 30], (rows for _, rows in tables[::2]), strict=True):
        measured = [row for row in result["rows"] if row["n"] == n]
        all_ms = [measured[0]["all_ms_authors"], *(row["all_ms"] for row in measured)]
        shown = [cells[rows[0].index("min-max")].split("-") for cells in rows[1:]]
        for (least, most), ms in zip(shown, all_ms, strict=True):
            assert float(least) == pytest.approx(min(ms), rel=5e-3)
            assert float(most) == pytest.approx(max(ms), rel=5e-3)


def test_ranks_with_different_data_are_measured_as_one_batch() -> None:
    result = bench_loss([12], 19, repeats=3, device="cpu", processes=3)
    check_rows(result, [12], ["dense", "gram", "sharded"], world=3)
    assert all(row["bytes_sent"] > 0 and row["bytes_planned"] > 0 for row in result["rows"])
    assert "plain batch-norm over\ngloo" in as_markdown(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wrong_gradient_shows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(24, 40, dtype, ("gram",), 1)
    right = measure(task, ALONE).errors["gram", "torch"]
    total = bench._total
    monkeypatch.setattr(bench, "_total", lambda *arguments: 1.25 * total(*arguments))
    wrong = measure(task, ALONE)
    assert right < (1e-5 if dtype == torch.float32 else 5e-3)
    assert wrong.errors["gram", "torch"] == pytest.approx(0.25, abs=2 * right)
    assert wrong.errors[AUTHORS] < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("algorithm", ["dense", "gram", "sharded"])
def test_the_products_alone_are_those_of_the_algorithm(algorithm: str) -> None:
    task = Task(14, 33, torch.float32, (algorithm,), 1)
    loss, views = bench._losses(task, ALONE)[algorithm, "torch"], bench._views(task, ALONE)
    counts = []
    for call in (lambda: bench._gradients(loss, *views), bench._products(algorithm, task, ALONE)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts == [estimate(algorithm, 14, 33, 1, 4, Hardware(1, 1, 1, 1)).flop] * 2


MEMORY = """
from functools import partial
import torch
from tools.bench.memory import peak_bytes, return_freed_memory

return_freed_memory()
block = partial(torch.ones, 5_000_000)  # 20 MB

def in_turn():
    for _ in range(4):
        block()

for call in (lambda: None, block, in_turn, lambda: [block() for _ in range(4)]):
    print(peak_bytes(call, torch.device("cpu")))
"""


def test_peak_memory_of_known_allocations_on_the_cpu() -> None:
    """What is freed in between counts once, what is held together adds up, and what is returned counts."""
    command = [sys.executable, "-c", MEMORY]
    root = Path(__file__).resolve().parents[1]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    nothing, one, in_turn, together = (int(line) for line in output.split())
    assert nothing <= SLACK_BYTES
    assert one == pytest.approx(20e6, abs=SLACK_BYTES)
    assert in_turn == pytest.approx(20e6, abs=SLACK_BYTES)
    assert together == pytest.approx(80e6, abs=SLACK_BYTES)


@pytest.mark.parametrize(
    ("ranks", "n", "width"),
    [(1, 501, 1530), (1, 1002, 730), (1, 2002, 150), (2, 502, 1530), (2, 1002, 730), (2, 2002, 150)],
)
def test_planned_memory_is_what_the_loss_takes(ranks: int, n: int, width: int) -> None:
    """Never less than torch takes in float32, and at most a third more, as Triton takes there.

    Wide embeddings take most in the backward pass, narrow ones in the forward pass of gram and sharded.
    """
    task = Task(n, width, torch.float32, (), 1)
    found = on_ranks(partial(measure_peaks, task), ranks, "cpu")
    algorithms = [algorithm for algorithm, implementation in found[0] if implementation == "torch"]
    assert algorithms == ["authors", "dense", "gram", "sharded"][: 2 + ranks]
    for algorithm in algorithms[1:]:
        peak = max(peaks[algorithm, "torch"] for peaks in found)
        planned = estimate(algorithm, n, width, ranks, 4, Hardware(1, 1, 1, 1)).peak_bytes
        assert 0.75 * planned - SLACK_BYTES <= peak <= planned, algorithm


def test_bytes_sent_by_four_ranks_are_those_of_the_plan(run_ranks, tmp_path: Path) -> None:
    """Within 2 %, the share of gloo's headers: 252 samples of 1021 features."""
    samples, width, floats, W = 252, 1021, 300_000, 4
    run_ranks(W, "traffic.py", tmp_path, samples, width, floats)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(W)]
    for sent in ranks:
        assert sent.pop("nothing") == 0
        # A ring sends all parts but one twice: once to be summed up, once as sums.
        assert sent.pop("all-reduce") == pytest.approx(2 * (W - 1) / W * 4 * floats, rel=0.01)
        assert len(sent) == 6
        for name, num_bytes in sent.items():
            algorithm, operand_bytes = name.split()
            planned = estimate(algorithm, samples, width, W, int(operand_bytes), Hardware(1, 1, 1, 1))
            assert num_bytes == pytest.approx(planned.bytes_sent, rel=0.02), name


def test_what_cannot_be_measured_is_refused_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^There is no algorithm 'grams'; choose from dense, .*\.$"):
        bench_loss([8], 8, algorithms=["grams"])
    with pytest.raises(ConfigError, match=r"^10 samples .* 4 ranks; .*\.$"):
        bench_loss([8, 10], 8, processes=4)
    with pytest.raises(ConfigError, match=r"^Embeddings of width 3 are too narrow; choose 4 or more\.$"):
        bench_loss([8], 3, processes=4)
    with pytest.raises(ConfigError, match=r"^The loss normalises .* on 1; choose 2 or more\.$"):
        bench_loss([8, 1], 8)
    gpus = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=rf"^{gpus + 1} ranks .* offers {gpus}; .*\.$"):
        bench_loss([8 * (gpus + 1)], 64, processes=gpus + 1, device="cuda")


@pytest.mark.parametrize("processes", [1, 2])
def test_too_little_memory_is_said_in_a_sentence(processes: int) -> None:
    """7 million features: their C has more bytes than there are addresses."""
    with pytest.raises(DataError, match=r"^The loss for N = 4 and width 7000000 does not fit .*\.$"):
        bench_loss([4], 7_000_000, algorithms=["gram"], device="cpu", processes=processes)


def test_a_place_that_cannot_be_written_is_refused_before_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.bench.loss.bench_loss", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    (tmp_path / "locked").mkdir()
    for out, reason in [
        (tmp_path / "none" / "loss.md", "its folder does not exist; create it first."),
        (tmp_path, f"it is a folder; name a file in it, such as {tmp_path / 'loss.md'}."),
        (tmp_path / "locked" / "loss.md", "permission denied; choose another place."),
    ]:
        result = CliRunner().invoke(app, ["bench", "loss", "--out", str(out)])
        assert (result.exit_code, result.stderr) == (2, f"Cannot write {out}: {reason}\n")


def test_ranks_without_a_gpu_for_each_are_said_to_compute_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    arguments = ["bench", "loss", "--samples", "8", "--width", "11", "--repeats", "1", "--procs", "2"]
    said = "2 ranks compute on the CPU, as there is not a GPU for each.\n"
    page = tmp_path / "loss.md"
    result = CliRunner().invoke(app, [*arguments, "--out", str(page)])
    assert result.exit_code == 0 and result.stdout.startswith(said) and "cpu on 2 ranks" in page.read_text()
    assert said not in CliRunner().invoke(app, [*arguments, "--device", "cpu"]).output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_implementations_are_measured_on_a_gpu() -> None:
    result = bench_loss([256], 1024, dtype="bf16", repeats=3, device="cuda")
    variants = [(row["algorithm"], row["implementation"]) for row in result["rows"]]
    assert variants == [(a, i) for a in ("dense", "gram") for i in ("torch", "triton")]
    for row in result["rows"]:
        assert row["over_products"] > 0 and math.isfinite(row["speedup"])
        assert row["grad_rel_err"] <= 1.1 * row["grad_rel_err_authors"]
        # C and its copies alone: at least one in half precision.
        assert row["peak_bytes_authors"] > 2 * 1024**2
        (planned,) = (e for e in result["plans"][0]["estimates"] if e["algorithm"] == row["algorithm"])
        assert 0.7 < row["peak_bytes"] / planned["peak_bytes"] < 1.05
