"""The benchmark of the step compares with the authors' step, counts rightly, and says what does not fit."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from model.config import ModelConfig
from model.twin import Twin
from pipelines.augment import IMPLEMENTATIONS
from pipelines.augment.torch_ops import distort
from pipelines.batch import Batch
from pipelines.errors import DataError
from pipelines.loaders import build_loader
from tools.bench import step as bench
from tools.bench.step import bench_step
from tools.bench.step_authors import AuthorsStep, authors_precision
from tools.bench.step_flop import flop_utilisation, loss_flop, our_loss_algorithm
from tools.bench.step_measure import AUTHORS, OURS, UNDISTORTED, contenders, measure
from tools.bench.step_table import step_legend, step_tables
from tools.cli import app
from train.config import RunConfig
from train.errors import ConfigError
from train.flop import count_flop, model_flop, peak_flops
from train.loop import build_twin
from train.step import PHASES, TrainStep

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FIELDS = {
    "name",
    "batch_size",
    "precision",
    "pairs_per_second",
    "ms_per_step",
    "speedup",
    "share_of_synthetic",
}
FIELDS |= {"loss_algorithm", "flop_per_step", "tflops", "mfu", "peak_memory_bytes", "phases_ms"}
FIELDS |= {"all_ms_per_step"}
AUTHORS_PHASES = ["data wait", "forward", "loss", "backward", "optimizer"]


def configure(**sections: dict) -> RunConfig:
    data = {"path": "none", "loader": "synthetic", "image_size": 16, "workers": 1, **sections.get("data", {})}
    model = {"backbone": "resnet18", "projector": "19-13", **sections.get("model", {})}
    optim = {"lr_weights": 400, "lr_biases": 30, "weight_decay": 1e-3, "warmup_epochs": 0}
    train = {"precision": "fp32", "device": "cpu", "epochs": 9, "batch_size": 10, "optim": optim}
    train |= sections.get("train", {})
    return RunConfig.model_validate({"run_dir": "none", "data": data, "model": model, "train": train})


def make_batch(config: RunConfig) -> tuple[Batch, int]:
    loader = build_loader(config.data, seed=4, batch_size=config.train.batch_size, device=CPU)
    batch, steps_per_epoch = next(iter(loader.epoch(0))), loader.steps_per_epoch
    loader.close()
    return batch, steps_per_epoch


class InFloat64(nn.Module):
    """A twin that computes in float64, whatever it is given."""

    def __init__(self, twin: Twin) -> None:
        super().__init__()
        self.twin = twin.double()

    def forward(self, views_VNCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.twin(views_VNCHW.double())


@pytest.mark.parametrize("norm", ["torch", "twin"])
def test_the_authors_steps_lead_to_the_same_weights_as_ours(norm: str) -> None:
    """Two steps from the same weights on the same undistorted views: with weight decay and with momentum."""
    config = configure(model={"norm": norm})
    augment = config.data.augment.model_copy(update={"implementation": "dali"})  # only normalises
    config = config.model_copy(update={"data": config.data.model_copy(update={"augment": augment})})
    batch, steps_per_epoch = make_batch(config)
    scale_C, offset_C = (torch.tensor(value) for value in augment.normalisation)
    views_VNCHW = (batch.views_VNHWC * scale_C + offset_C).movedim(-1, 2).contiguous()

    ours = TrainStep(config, InFloat64(build_twin(config, CPU).train()), steps_per_epoch)
    authors = AuthorsStep(config, CPU, steps_per_epoch)
    authors.network.double()
    authors.loss.double()
    found, expected = ours.network.twin.state_dict(), authors.network.state_dict()
    before = {name: value.clone() for name, value in expected.items()}
    torch.testing.assert_close(dict(found), before, rtol=0, atol=0)
    for step in range(2):
        total = authors(views_VNCHW.double(), step)
        torch.testing.assert_close(total, ours(batch, step).total, rtol=1e-5, atol=0)
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-5, atol=1e-7)
    for name, p in authors.network.named_parameters():
        assert (p.detach() - before[name]).abs().max() > 1e-3, name


def test_the_authors_network_is_torchvisions_in_contiguous_format() -> None:
    network = AuthorsStep(configure(), CPU, 5).network
    assert {type(m) for m in network.modules() if "Norm" in type(m).__name__} == {
        nn.BatchNorm1d,
        nn.BatchNorm2d,
    }
    assert all(p.is_contiguous() for p in network.parameters())
    passes: list[tuple[int, ...]] = []
    network.backbone.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape))
    network(torch.randn(2, 3, 3, 24, 24))
    assert passes == [(3, 3, 24, 24)] * 2


def test_the_authors_precision_is_their_scaled_fp16_where_ours_is_half_on_a_gpu() -> None:
    for ours, on_gpu in (("bf16", "fp16"), ("fp16", "fp16"), ("fp32", "fp32")):
        config = configure(train={"precision": ours})
        assert authors_precision(config, GPU) == on_gpu
        assert authors_precision(config, CPU) == ours
        assert AuthorsStep(config, CPU, 5).scaler.is_enabled() == (ours == "fp16")


class Toy(nn.Module):
    """A convolution and a product, on each view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, kernel_size=5, stride=3)  # of 18 x 18 pixels it makes 5 x 5
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(6 * 5 * 5, 9, bias=False))

    def forward(self, views_VNCHW: Tensor) -> tuple[Tensor, Tensor]:
        z_a_ND, z_b_ND = (self.head(self.conv(view_NCHW)) for view_NCHW in views_VNCHW)
        return z_a_ND, z_b_ND


def test_flop_of_a_convolution_and_a_product_are_those_counted_by_hand() -> None:
    N = 7
    conv = 2 * (N * 6 * 5 * 5) * (3 * 5 * 5)  # a multiplication and an addition for each weight and output
    head = 2 * N * (6 * 5 * 5) * 9
    # Backward, each costs the same for its weights and again for its input, which the images do not need.
    expected = 2 * (2 * conv + 3 * head)
    assert count_flop(Toy(), torch.randn(2, N, 3, 18, 18)) == expected
    with torch.device("meta"):
        assert count_flop(Toy(), torch.empty(2, N, 3, 18, 18)) == expected


def test_model_flop_are_those_of_the_network_that_trains() -> None:
    config = ModelConfig(backbone="resnet18", projector="40-24", norm="torch")
    N, S = 3, 40
    assert model_flop(config, N, S) == count_flop(Twin(config), torch.randn(2, N, 3, S, S))
    assert model_flop(config.model_copy(update={"norm": "twin"}), N, S) == model_flop(config, N, S)
    assert model_flop(config, 2 * N, S) == 2 * model_flop(config, N, S)


@pytest.mark.parametrize(
    ("loss", "algorithm"),
    [({}, "gram"), ({"algorithm": "dense"}, "dense"), ({"temperature": 0.1}, "dense")],
)
def test_loss_flop_are_those_of_the_algorithm_that_the_step_takes(loss: dict, algorithm: str) -> None:
    config = configure(model={"projector": "19-4096", "loss": loss})
    assert our_loss_algorithm(config.model, 10, torch.float32, CPU) == algorithm
    network = model_flop(config.model, 10, 16)
    batch, steps_per_epoch = make_batch(config)
    step = TrainStep(config, build_twin(config, CPU).train(), steps_per_epoch)
    with FlopCounterMode(display=False) as counter:
        step(batch, 0)
    assert counter.get_total_flops() == network + loss_flop(algorithm, 10, 4096)
    assert loss_flop("dense", 10, 4096) == 6 * 10 * 4096**2


def test_utilisation_is_the_share_of_the_published_peak() -> None:
    assert flop_utilisation(30e12, 0.2, 600e12) == pytest.approx(0.25)
    assert flop_utilisation(30e12, 0.2, None) is None
    assert peak_flops("Tesla V100-SXM2-16GB", "fp16") == 125e12
    assert peak_flops("Tesla V100-PCIE-32GB", "fp32") == 14e12
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA A100 80GB PCIe", "fp32") == 19.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H200", "fp16") == 989e12
    assert peak_flops("NVIDIA H200 NVL", "fp16") == 835e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
    assert peak_flops("NVIDIA GeForce GTX 1080", "fp16") is None


RECIPE = """
run_dir: none
data: {path: none, image_size: 20, workers: 1}
model: {backbone: resnet18, projector: 19-13}
train: {precision: bf16, device: cpu}
"""


@pytest.fixture(scope="module")
def printed(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    recipe = tmp_path_factory.mktemp("bench-step") / "tiny.yaml"
    recipe.write_text(RECIPE)
    options = [
        "--batch",
        "6",
        "--steps",
        "2",
        "--repeats",
        "2",
        "--json",
        "--loader",
        "ffcv",
        "--data",
        beton,
    ]
    result = CliRunner().invoke(
        app, ["bench", "step", str(recipe), "train.precision=fp32", *map(str, options)]
    )
    assert result.exit_code == 0, result.output
    return result


def test_rows_hold_all_fields_and_agree_with_each_other(
    printed: Result, check_figures: Callable[[dict, int], None]
) -> None:
    report, live = json.loads(printed.stdout), "ours, loader ffcv"
    check_figures(report, 2)
    assert (report["steps"], report["repeats"], report["unavailable"]) == (2, 2, [])
    assert report["settings"]["augment"] == "numba"
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [OURS, UNDISTORTED, AUTHORS, live]
    for name, row in rows.items():
        assert row.keys() == FIELDS
        all_ms = row["all_ms_per_step"]
        assert len(all_ms) == 2 and row["ms_per_step"] == median(all_ms)
        assert row["pairs_per_second"] == pytest.approx(6000 / row["ms_per_step"])
        ratios = [a / b for a, b in zip(rows[AUTHORS]["all_ms_per_step"], all_ms, strict=True)]
        assert row["speedup"] == pytest.approx(median(ratios))
        assert row["tflops"] == pytest.approx(row["flop_per_step"] / row["ms_per_step"] / 1e9)
        assert (row["batch_size"], row["precision"], row["mfu"]) == (6, "fp32", None)
        assert list(row["phases_ms"]) == (AUTHORS_PHASES if name == AUTHORS else ["data wait", *PHASES])
        # Medians of the phases do not add up to that of the step, but lie within the turns.
        assert 0 < sum(row["phases_ms"].values()) <= 1.01 * max(all_ms)
    shares = zip(rows[OURS]["all_ms_per_step"], rows[live]["all_ms_per_step"], strict=True)
    assert rows[live].pop("share_of_synthetic") == pytest.approx(median(a / b for a, b in shares))
    assert rows[live].pop("peak_memory_bytes") is None
    # Weights, gradients and momenta alone, of the 11 million parameters of ResNet-18.
    assert all(rows[name]["peak_memory_bytes"] > 3 * 4 * 11e6 for name in (OURS, UNDISTORTED, AUTHORS))
    assert all(rows[name]["share_of_synthetic"] is None for name in (OURS, UNDISTORTED, AUTHORS))
    dense, gram = loss_flop("dense", 6, 13), loss_flop("gram", 6, 13)
    assert rows[AUTHORS]["flop_per_step"] - rows[OURS]["flop_per_step"] == dense - gram


def test_tables_and_legend_go_beside_the_json(printed: Result) -> None:
    report = json.loads(printed.stdout)
    speeds, phases = step_tables(report)
    assert "19-13, 20 px, fp32, batch 6" in speeds[0] and "median of 2" in speeds[0]
    for _, rows in (speeds, phases):
        assert [row[0] for row in rows[1:]] == [row["name"] for row in report["rows"]]
        assert len({len(row) for row in rows}) == 1
    assert step_legend(report) in printed.stderr and "of synthetic" in step_legend(report)
    assert "ours, views given" in printed.stderr


def test_only_the_step_with_distortions_distorts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(*arguments: object) -> Tensor:
        calls.append("")
        return distort(*arguments)

    monkeypatch.setitem(IMPLEMENTATIONS, "torch", lambda: counted)
    config = configure(data={"augment": {"implementation": "torch"}})
    counts = {}
    for contender in contenders(config, None, CPU):
        calls.clear()
        measure(contender, 2, CPU)
        counts[contender.name] = len(calls)
    assert counts == {OURS: 3, UNDISTORTED: 0, AUTHORS: 1}  # theirs once, before the clock starts


def test_the_authors_batch_is_held_once() -> None:
    """What it was made of would count as memory of their step."""
    config = configure(data={"image_size": 23})
    (theirs,) = (c for c in contenders(config, None, CPU) if c.name == AUTHORS)
    with theirs.open(lambda phase: None) as (_, batches):
        views_VNCHW = next(batches)
        tensors = [o for o in gc.get_objects() if type(o) is Tensor and o.is_floating_point()]
        held = [o.data_ptr() for o in tensors if 23 in o.shape]
        assert views_VNCHW.is_contiguous() and held == [views_VNCHW.data_ptr()]


def test_every_size_has_its_rows_and_what_does_not_fit_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_small(contender: bench.Contender, steps: int, device: torch.device) -> bench.Turn:
        if contender.name == AUTHORS and contender.open.args[0].train.batch_size == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return bench.Turn(0.5, {"forward": 0.5}, None)

    heard: list[tuple[int, int]] = []
    monkeypatch.setattr(bench, "measure", measure_small)
    monkeypatch.setattr(bench, "run_ranks", lambda *_: [{}])
    result = bench_step(
        configure(), [4, 6], repeats=2, progress=lambda done, total: heard.append((done, total))
    )
    assert heard == [(done, 4) for done in range(1, 5)]
    found = [(row["batch_size"], row["name"], row["speedup"]) for row in result["rows"]]
    assert found == [
        (4, OURS, 1),
        (4, UNDISTORTED, 1),
        (4, AUTHORS, 1),
        (6, OURS, None),
        (6, UNDISTORTED, None),
    ]
    (left_out,) = result["unavailable"]
    assert (left_out["name"], left_out["batch_size"]) == (AUTHORS, 6)
    tables = step_tables(result)
    assert len(tables) == 4 and tables[2][1][1][:4] == [OURS, "12", "500", "-"]

    def measure_nothing(*arguments: object) -> bench.Turn:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(bench, "measure", measure_nothing)
    with pytest.raises(DataError, match=r"^No step fits into the memory of cpu; choose a smaller .*\.$"):
        bench_step(configure(), [4])


def test_bad_input_gets_one_sentence(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)

    def refuse(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["bench", "step", *map(str, arguments)])
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
        return result.stderr

    assert "tiny.yml" in refuse(tmp_path / "tiny.yml")
    assert "unknown key 'model.norn'" in refuse("model.norn=twin")
    assert "such as 256,512, not '64;128'" in refuse(recipe, "--batch", "64;128")
    assert "2 pairs or more, not 1" in refuse(recipe, "--batch", "8,1")
    assert "fp64 is for comparing runs" in refuse(recipe, "train.precision=fp64")
    assert "data.loader" in refuse(recipe, "--loader", "fastest")
    assert "nowhere" in refuse(recipe, "--batch", 4, "--loader", "folder", "--data", "nowhere")
    with pytest.raises(ConfigError, match=r"^train\.micro_batches must divide the 5 .*\.$"):
        bench_step(configure(train={"micro_batches": 2}), [5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_rows_on_a_gpu_have_its_memory_and_its_peak(cuda_graph: bool) -> None:
    config = configure(train={"device": "cuda", "precision": "bf16", "cuda_graph": cuda_graph})
    report = bench_step(config, [16], steps=3, repeats=2)
    by_name = {row["name"]: row for row in report["rows"]}
    assert [row["precision"] for row in by_name.values()] == ["bf16", "bf16", "fp16"]
    for row in by_name.values():
        assert row["peak_memory_bytes"] > 3 * 4 * 11e6
        peak = peak_flops(torch.cuda.get_device_name(), row["precision"])
        if peak is not None:
            assert row["mfu"] == pytest.approx(row["tflops"] * 1e12 / peak)
    phases = ["step"] if cuda_graph else list(PHASES)
    assert list(by_name[OURS]["phases_ms"]) == ["data wait", *phases]
