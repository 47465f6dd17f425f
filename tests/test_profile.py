"""The profile measures what it says it measures."""

import gzip
import html
import json
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from pipelines.source import open_source
from tests.ranks.profiled import profile_tiny
from tools.bench import timing
from tools.bench.timing import PhaseTimer, endless
from tools.profile import ceilings, run
from tools.profile.reading import measure_reading
from tools.profile.result import SPLIT, check_writable, headline, read_json, shares
from tools.profile.run import Progress, profile_run
from tools.profile.split import StepSplitter
from train.config import RunConfig
from train.distributed import World
from train.errors import TrainingError
from train.step import PHASES

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time stands still but for what the test adds."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., None]) -> RunConfig:
    root = tmp_path_factory.mktemp("profile")
    write_images(root / "images", ["a", "b"], 4)
    return RunConfig.model_validate(
        {
            "run_dir": root / "run",
            "data": {"path": root / "images", "loader": "folder", "image_size": 32, "workers": 0},
            "model": {"backbone": "resnet18", "projector": "8-8"},
            "train": {
                "epochs": 1,
                "batch_size": 4,
                "precision": "fp32",
                "device": "cpu",
                "optim": {"warmup_epochs": 0},
            },
        }
    )


@pytest.fixture(autouse=True)
def _short_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "STAGE_SECONDS", 0.02)


def test_timer_gives_each_phase_the_time_since_the_mark_before_it(clock: Callable[[float], None]) -> None:
    timer = PhaseTimer(CPU)
    for data, forward in ((1.0, 5.0), (3.0, 7.0)):
        timer.start()
        clock(data)
        timer.mark("data wait")
        clock(forward)
        timer.mark("forward")
        clock(1000.0)  # between two steps: nobody's
    assert timer.mean_seconds() == {"data wait": 2.0, "forward": 6.0}


def test_cleared_timer_forgets_the_warm_up(clock: Callable[[float], None]) -> None:
    timer = PhaseTimer(CPU)
    for seconds in (50.0, 2.0):
        timer.clear()
        timer.start()
        clock(seconds)
        timer.mark("forward")
    assert timer.mean_seconds() == {"forward": 2.0}


def test_stream_goes_on_with_the_next_epoch() -> None:
    class TwoBatches:
        def epoch(self, epoch: int) -> Iterator[str]:
            return iter([f"{epoch}a", f"{epoch}b"])

    stream = endless(TwoBatches())
    assert [next(stream) for _ in range(5)] == ["0a", "0b", "1a", "1b", "2a"]


def test_shares_add_up_to_the_step() -> None:
    assert shares({"data wait": 0.1, "forward": 0.3}) == pytest.approx({"data wait": 0.25, "forward": 0.75})


@pytest.fixture(scope="module")
def profile(config: RunConfig) -> tuple[dict, list[Progress], Path]:
    """A profile, what it told meanwhile, and where it is; the run has a checkpoint."""
    config.run_dir.mkdir()
    (config.run_dir / "checkpoint.pt").write_bytes(b"not to be touched")
    told: list[Progress] = []
    out = config.run_dir.parent / "new" / "folder"
    return profile_tiny(config, out, on_progress=told.append), told, out


def test_profile_splits_real_steps_into_phases_that_add_up(profile: tuple) -> None:
    run = profile[0]["run"]
    assert list(run["phases"]) == [phase for phase in SPLIT if phase in ("data wait", *PHASES, "idle")]
    assert all(seconds > 0 for seconds in run["phases"].values())
    assert sum(run["phases"].values()) == pytest.approx(run["step_seconds"])
    assert run["pairs_per_second"] == pytest.approx(4 / run["step_seconds"])
    percentiles = run["step_seconds_percentiles"]
    assert 0 < percentiles["p10"] <= percentiles["p50"] <= percentiles["p90"]
    (rank,) = profile[0]["ranks"]
    assert rank["phases"] == run["phases"]
    busy = sum(seconds for phase, seconds in run["phases"].items() if phase in PHASES)
    assert rank["busy_seconds"] == pytest.approx(busy)


def test_profile_measures_each_part_alone_and_tells_which(profile: tuple) -> None:
    result, told, _ = profile
    assert list(result["ceilings"]) == ["read", "decode", "crop", "augment", "step", "loader"]
    assert all(part["pairs_per_second"] > 0 for part in result["ceilings"].values())
    assert result["collectives"] == []
    assert result["dataset"]["images"] == 8 and 20 <= result["dataset"]["mean_longer_side"] < 60
    parts = dict.fromkeys(progress.part for progress in told)
    assert list(parts) == [
        "the stages of loading",
        "the step alone",
        "the loader alone",
        "loader and step together",
        "what the device can reach, and kernels",
    ]


def test_profile_writes_its_files_and_leaves_the_checkpoint_alone(config: RunConfig, profile: tuple) -> None:
    result, _, out = profile
    assert read_json(out / "profile.json") == json.loads(json.dumps(result)) == result
    assert result["verdict"]["sentence"] in html.unescape((out / "report.html").read_text())
    assert json.loads(gzip.decompress((out / result["kernels"]["trace"]).read_bytes()))["traceEvents"]
    assert sum(result["kernels"]["shares"].values()) == pytest.approx(1)
    assert result["utilisation"]["samples"] > 0 and result["peaks"]["flops"] > 0
    (checkpoint,) = config.run_dir.iterdir()
    assert checkpoint.read_bytes() == b"not to be touched"
    assert headline(result).endswith(f"{result['run']['pairs_per_second']:.1f} pairs/s")


def test_what_is_no_profile_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("{")
    (tmp_path / "list").write_text("[]")
    for name in ("absent", "text", "list"):
        with pytest.raises(TrainingError, match=rf"^[^\n]*{tmp_path / name}[^\n]*\.$"):
            read_json(tmp_path / name)


def test_reading_is_of_the_second_half_of_the_epoch_and_counts_its_bytes(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(config.data.path)
    asked: list[int] = []
    encoded = type(source).encoded
    monkeypatch.setattr(type(source), "encoded", lambda s, i: asked.append(i) or encoded(s, i))
    job = ceilings.loader_job(config, World(0, 1, CPU))
    order = [
        index for task, _ in zip(job.tasks(8, source, 0, 0), range(2), strict=False) for index in task[2]
    ]
    read = measure_reading(job, seconds=60.0)
    assert asked == order[4:]
    num_bytes = sum(os.path.getsize(source.name(index)) for index in asked)  # noqa: PTH202
    assert read["bytes_per_second"] / read["pairs_per_second"] == pytest.approx(num_bytes / 4)
    assert read["threads"] == 1 and read["cold"] in (True, False, None)


def test_waits_in_collectives_are_taken_from_the_phases_they_are_in(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step: 1 for data, 2 in forward of which 0.5 in a collective, 4 in backward of which 3 waiting."""
    call = torch.distributed.all_reduce

    def all_reduce(tensor: torch.Tensor) -> None:
        clock(0.5)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    splitter = StepSplitter(CPU)
    splitter._watch_gradients = lambda network: None

    class Step:
        network = torch.nn.Identity()

        def __call__(self, batch: object, step: int) -> None:
            torch.distributed.all_reduce(torch.ones(3))
            clock(1.5)
            splitter.mark("forward")
            clock(1.0)
            splitter._last_gradient = timing.Stamp(CPU)
            clock(3.0)
            splitter.mark("backward")
            clock(0.25)

    def batches() -> Iterator[int]:
        for number in count():
            clock(1.0)
            yield number

    assert list(splitter.run(Step(), batches(), steps=2))[-2:] == [1, 2]
    assert torch.distributed.all_reduce is all_reduce
    monkeypatch.undo()
    assert torch.distributed.all_reduce is call
    split = splitter.split()
    assert split.seconds == pytest.approx([7.25, 7.25])
    assert split.phases == pytest.approx({"data wait": 1.0, "forward": 1.5, "backward": 1.0, "idle": 0.25})
    ((what, per_step),) = split.calls.items()
    assert what[:3] == ("all_reduce", "other", 3) and what.bytes == 12 and per_step == 1


class PacedLoader:
    """Makes a batch every `seconds` in the background, as long as fewer than `held` wait to be taken."""

    steps_per_epoch = 10**6

    def __init__(self, seconds: float, held: int, clock: Callable[[float], None]) -> None:
        self.seconds, self.held, self.clock = seconds, held, clock

    def epoch(self, epoch: int) -> Iterator[object]:
        taken: list[float] = []
        ready = timing.time.perf_counter()
        for number in count():
            began = max(ready, taken[number - self.held]) if number >= self.held else ready
            ready = began + self.seconds
            self.clock(max(0.0, ready - timing.time.perf_counter()))
            taken.append(timing.time.perf_counter())
            yield object()

    def close(self) -> None: ...


@pytest.mark.parametrize(("prefetch", "workers"), [(1, 0), (3, 8), (16, 1)])
@pytest.mark.parametrize("seconds", [0.5, 1.9, 2.0, 2.1, 4.0, 10.0])
def test_batches_made_ahead_do_not_pass_for_speed(
    config: RunConfig,
    clock: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seconds: float,
    prefetch: int,
    workers: int,
) -> None:
    """The loader needs `seconds` for a batch, the step 2, and building the network 1000."""

    def rank_loader(config: RunConfig, world: object) -> PacedLoader:
        data = config.data
        held = data.prefetch + max(0, data.workers - 1)  # as torch's DataLoader at worst
        return PacedLoader(0.0 if data.loader == "synthetic" else seconds, held, clock)

    def build_twin(*arguments: object) -> torch.nn.Module:
        clock(1000.0)
        return torch.nn.Identity()

    def build_step(*arguments: object, mark: Callable[[str], None]) -> Callable[..., None]:
        class Step:
            network = torch.nn.Identity()

            def __call__(self, *arguments: object) -> None:
                clock(2.0)
                mark("forward")

        return Step()

    monkeypatch.setattr(run, "rank_loader", rank_loader)
    monkeypatch.setattr(run, "build_twin", build_twin)
    monkeypatch.setattr(run, "TrainStep", build_step)
    monkeypatch.setattr(run, "stage_ceilings", lambda config, world: ({}, None))
    monkeypatch.setattr(run, "_loss_algorithm", lambda config, world, step: "gram")
    monkeypatch.setattr(run, "measure_peaks", lambda device, precision: None)
    monkeypatch.setattr(run, "trace_steps", lambda *arguments: None)
    for write in ("write_profile", "write_page"):
        monkeypatch.setattr(run, write, lambda profile, out: None)
    data = config.data.model_copy(update={"prefetch": prefetch, "workers": workers})
    config = config.model_copy(update={"data": data})

    profile = profile_run(config, 5, tmp_path)
    assert profile["ceilings"]["loader"]["pairs_per_second"] == pytest.approx(4 / seconds)
    assert profile["ceilings"]["step"]["pairs_per_second"] == pytest.approx(4 / 2)
    assert profile["run"]["pairs_per_second"] == pytest.approx(4 / max(seconds, 2))


def test_folder_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "profile"):
        with pytest.raises(TrainingError, match=rf"^Cannot write the profile to {out}: [^\n]*\.$"):
            check_writable(out)
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_profile_on_a_gpu_times_every_phase(config: RunConfig, tmp_path: Path, cuda_graph: bool) -> None:
    train = config.train.model_copy(update={"device": "cuda", "cuda_graph": cuda_graph})
    profile = profile_run(config.model_copy(update={"train": train}), 3, tmp_path)
    phases = profile["run"]["phases"]
    own = ["step"] if cuda_graph else list(PHASES)
    assert list(phases) == ["data wait", "copy", *own, "idle"]
    assert all(phases[phase] > 0 for phase in own)
    assert min(phases["data wait"], phases["copy"]) >= 0
    assert sum(phases.values()) == pytest.approx(profile["run"]["step_seconds"])
    assert profile["ceilings"]["copy"]["bytes_per_second"] > 0
    assert profile["ceilings"]["step"]["host_lead_seconds"] is not None
