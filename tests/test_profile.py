"""The profile measures what it says it measures."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from pipelines.config import DataConfig
from tools import profile as profile_tool
from tools.bench import timing
from tools.bench.timing import PhaseTimer, endless
from tools.figures import PHASE_COLOURS
from tools.profile import Profile, check_writable, profile_run, write_profile
from train.config import RunConfig
from train.errors import TrainingError

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


def a_profile(loader: float, step: float) -> Profile:
    return Profile({"data wait": 0.1, "forward": 0.3}, loader, step, batch_size=32, steps=5, environment={})


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
    profile = a_profile(loader=1.0, step=2.0)
    assert profile.step_seconds == pytest.approx(0.4)
    assert profile.shares == pytest.approx({"data wait": 0.25, "forward": 0.75})
    assert profile.pairs_per_second == pytest.approx(80)


def test_verdict_names_the_slower_half_and_both_figures() -> None:
    assert a_profile(loader=120.0, step=80.5).verdict == (
        "The step limits: alone it takes 80.5 pairs/s; the loader alone could deliver 120.0."
    )
    assert a_profile(loader=80.5, step=120.0).verdict == (
        "The loader limits: alone it delivers 80.5 pairs/s; the step alone could take 120.0."
    )


def test_profile_splits_real_steps_and_leaves_the_checkpoint_alone(config: RunConfig, tmp_path: Path) -> None:
    config.run_dir.mkdir()
    checkpoint = config.run_dir / "checkpoint.pt"
    checkpoint.write_bytes(b"not to be touched")
    parts: list[str] = []
    profile = profile_run(config, steps=2, on_phase=parts.append)
    assert list(profile.phases) == list(PHASE_COLOURS)
    assert all(seconds > 0 for seconds in profile.phases.values())
    assert min(profile.loader_pairs_per_second, profile.step_pairs_per_second) > 0
    assert parts == ["the loader alone", "loader and step together", "the step alone"]
    assert checkpoint.read_bytes() == b"not to be touched"
    assert list(config.run_dir.iterdir()) == [checkpoint]

    write_profile(profile, tmp_path / "new" / "folder")
    saved = json.loads((tmp_path / "new" / "folder" / "profile.json").read_text())
    assert saved == profile.as_dict()
    assert (tmp_path / "new" / "folder" / "profile.png").read_bytes().startswith(b"\x89PNG")


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
    seconds: float,
    prefetch: int,
    workers: int,
) -> None:
    """The loader needs `seconds` for a batch, the step 2, and building the network 1000."""

    def build_loader(data: DataConfig, **options: object) -> PacedLoader:
        held = data.prefetch + max(0, data.workers - 1)  # as torch's DataLoader at worst
        return PacedLoader(0.0 if data.loader == "synthetic" else seconds, held, clock)

    def build_twin(*arguments: object) -> torch.nn.Module:
        clock(1000.0)
        return torch.nn.Identity()

    def build_step(*arguments: object, mark: Callable[[str], None]) -> Callable[..., None]:
        def step(*arguments: object) -> None:
            clock(2.0)
            mark("forward")

        return step

    monkeypatch.setattr(profile_tool, "build_loader", build_loader)
    monkeypatch.setattr(profile_tool, "build_twin", build_twin)
    monkeypatch.setattr(profile_tool, "TrainStep", build_step)
    data = config.data.model_copy(update={"prefetch": prefetch, "workers": workers})
    config = config.model_copy(update={"data": data})

    profile = profile_run(config, steps=5)
    assert profile.loader_pairs_per_second == pytest.approx(4 / seconds)
    assert profile.step_pairs_per_second == pytest.approx(4 / 2)
    assert profile.pairs_per_second == pytest.approx(4 / max(seconds, 2))


def test_folder_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "profile"):
        with pytest.raises(TrainingError, match=rf"^Cannot write the profile to {out}: [^\n]*\.$"):
            check_writable(out)
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_profile_on_a_gpu_times_every_phase(config: RunConfig) -> None:
    train = config.train.model_copy(update={"device": "cuda"})
    profile = profile_run(config.model_copy(update={"train": train}), steps=2)
    assert list(profile.phases) == list(PHASE_COLOURS)
    assert all(seconds > 0 for seconds in profile.phases.values())
