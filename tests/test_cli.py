"""The command line: help, the main job in miniature, and one clear sentence for whatever is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner, Result

from eval.config import EvalConfig
from tools import console
from tools.cli import app
from tools.cli_eval import eval_app
from tools.console import describe_step
from train.config import RunConfig
from train.loop import RunResult
from train.metrics import StepReport, read_metrics

COMMANDS = [
    [],
    ["demo"],
    ["convert"],
    ["verify"],
    ["inspect"],
    ["show-views"],
    ["bench", "step"],
    ["pretrain"],
    ["eval"],
    ["eval", "knn"],
    ["eval", "linear"],
    ["eval", "semisup"],
    ["eval", "report"],
    ["audit"],
    ["eval", "transfer"],
    ["eval", "voc07"],
    ["eval", "detect"],
    ["profile"],
    ["bench"],
    ["bench", "loader"],
    ["bench", "loss"],
    ["bench", "augment"],
    ["bench", "plan"],
    ["plan"],
    ["bench", "knn"],
    ["export"],
]
CLASSES = ["ant", "bee", "cat"]
RECIPE = {
    "run_dir": "run",
    "data": {"path": "images", "loader": "folder", "image_size": 32, "workers": 1},
    "model": {"backbone": "resnet18", "projector": "8-8"},
    "train": {
        "epochs": 1,
        "batch_size": 8,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "optim": {"warmup_epochs": 0},
    },
    "eval": {
        "features": {"image_size": 32, "resize": 32, "batch_size": 8, "workers": 0},
        "knn": {"k": 3},
        "linear": {"epochs": 2},
        "linear_fast": {"epochs": 2, "passes": 0},
    },
}


def call(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    """Standard output of a command that must succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def measure(*arguments: object) -> dict:
    """The result of a command with --json."""
    return json.loads(succeed(*arguments, "--json").splitlines()[-1])


def refuse(*arguments: object) -> str:
    """The sentence of a command that must fail with exit code 2."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (sentence,) = result.stderr.splitlines()
    assert sentence.endswith(".")
    return sentence


def in_a_process(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start the command as users do, by itself or by the module and options of a launcher."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tools.cli", *map(str, arguments)],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., None]) -> Path:
    """A folder with images/{train,val} of three classes and `tiny.yaml`, a run of two steps on them."""
    root = tmp_path_factory.mktemp("cli")
    write_images(root / "images" / "train", CLASSES, 6)
    write_images(root / "images" / "val", CLASSES, 3, seed=1)
    recipe = RECIPE | {
        "run_dir": str(root / "run"),
        "data": RECIPE["data"] | {"path": str(root / "images/train")},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def demo_result(root: Path) -> dict:
    """The demo on the images of `root`, which it takes for its own."""
    return measure("demo", "--out", root, "--config", root / "tiny.yaml")


@pytest.fixture(scope="module")
def failing_demo(root: Path, demo_result: dict) -> Result:
    """The same demo again, now as the shipped one and with a gain that no accuracy can have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.cli.DEMO_CONFIG", root / "tiny.yaml")
        patch.setattr("tools.cli.REQUIRED_GAIN_POINTS", 101)
        return call("demo", "--out", root, "--config", root / "tiny.yaml", "--json")


@pytest.fixture(scope="module")
def checkpoint(root: Path, demo_result: dict) -> Path:
    return root / "run" / "checkpoint.pt"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_a_manual_page(command: list[str]) -> None:
    text = succeed(*command, "--help")
    assert "Usage: " in text
    is_group = command in ([], ["eval"], ["bench"])
    assert is_group or ("Examples" in text or "Example" in text)
    assert "[bold]" not in text and "\\b" not in text


def test_demo_does_the_main_job_and_reports_it(root: Path, demo_result: dict) -> None:
    assert demo_result["steps"] == 2
    assert list(demo_result["accuracies"]) == ["raw pixels", "untrained network", "trained network"]
    for accuracies in demo_result["accuracies"].values():
        assert all(0 <= share <= 1 for share in accuracies.values())
    before, after = (demo_result["accuracies"][f"{w} network"]["kNN"] for w in ("untrained", "trained"))
    assert demo_result["gain_points"] == pytest.approx(100 * (after - before))
    report = Path(demo_result["report"]).read_text()
    for title in (
        "What the network sees",
        "The loss",
        "cross-correlation",
        "Where the time goes",
        "Settings",
    ):
        assert title in report
    assert f"{after:.1%}" in report
    for name in ("untrained.pt", "checkpoint.pt", "config.yaml", "metrics.jsonl", "profile/profile.json"):
        assert (root / "run" / name).stat().st_size > 0
    assert [record["step"] for record in read_metrics(root / "run")] == [1, 2]


def test_demo_is_made_anew_on_the_same_images(demo_result: dict, failing_demo: Result) -> None:
    again = json.loads(failing_demo.stdout.splitlines()[-1])
    assert again["accuracies"] == demo_result["accuracies"]


def test_demo_that_learns_too_little_says_so_and_fails(
    root: Path, demo_result: dict, failing_demo: Result
) -> None:
    sentence = "This recipe must gain at least 101 points"
    assert failing_demo.exit_code == 1
    assert failing_demo.stderr.splitlines()[-1].startswith(f"{sentence}, but gained ")
    assert sentence in (root / "report.html").read_text()
    assert demo_result["shortfall"] is None  # another recipe promises nothing


def test_evaluations_of_the_demo_can_be_repeated_by_hand(root: Path, demo_result: dict) -> None:
    for network, name in (("untrained network", "untrained.pt"), ("trained network", "checkpoint.pt")):
        for command, key in ((["knn"], "kNN"), (["linear", "--mode", "fast"], "linear")):
            result = measure("eval", *command, root / "run" / name, root / "train.beton", root / "val.beton")
            assert result["figures"]["top1"] == demo_result["accuracies"][network][key]
            sizes = {role: (part["images"], part["classes"]) for role, part in result["data"].items()}
            assert sizes == {"train": (18, 3), "test": (9, 3)}


def test_options_replace_the_settings_in_the_checkpoint(root: Path, checkpoint: Path) -> None:
    images = root / "images"
    options = "--k", 5, "--k", 2, "--k", 7, "--resize", 40
    result = measure("eval", "knn", checkpoint, images / "train", images / "val", *options)
    assert result["settings"]["knn"]["k"] == 5
    assert list(result["figures"]) == ["top1", "top1_k2", "top1_k7"]
    assert result["settings"]["features"] == RECIPE["eval"]["features"] | {"resize": 40}


def test_convert_then_pretrain_then_continue(root: Path, tmp_path: Path) -> None:
    beton = tmp_path / "set.beton"
    assert "18 images of 3 classes" in succeed("convert", root / "images" / "train", beton)
    overrides = [f"data.path={beton}", f"run_dir={tmp_path / 'run'}", "data.loader=ffcv"]
    first = measure("pretrain", root / "tiny.yaml", *overrides)
    assert (first["step"], first["steps_done"], first["last_report"]["step"]) == (2, 2, 2)
    assert Path(first["checkpoint"]).exists()
    assert "nothing to do" in succeed("pretrain", root / "tiny.yaml", *overrides)


def test_profile_into_a_bad_folder_is_refused_before_measuring(root: Path) -> None:
    result = call("profile", root / "tiny.yaml", "--out", root / "tiny.yaml" / "profile")
    assert result.exit_code == 2
    (sentence,) = result.stderr.splitlines()  # no "measuring ..."
    assert str(root / "tiny.yaml" / "profile") in sentence


def test_profile_writes_its_files_and_prints_json(root: Path, tmp_path: Path) -> None:
    result = call("profile", root / "tiny.yaml", "--steps", 1, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    profile = json.loads(result.stdout)
    assert sum(profile["run"]["phases"].values()) == pytest.approx(profile["run"]["step_seconds"])
    assert json.loads((tmp_path / "profile.json").read_text()) == profile
    assert "report.html" in {path.name for path in tmp_path.iterdir()}
    assert result.stderr.splitlines()[-1] == profile["verdict"]["sentence"]
    assert result.stderr.count("measuring the step alone") == 1


def test_benchmarks_print_json(root: Path, tmp_path: Path) -> None:
    options = "--size", 32, "--batch", 8, "--workers", 1, "--repeats", 1, "--seconds", 0.1
    loader = measure("bench", "loader", root / "images" / "train", "--only", "folder", *options)
    assert [row["loader"] for row in loader["rows"]] == ["authors", "folder", "folder"]
    size = "--samples", 4, "--width", 8, "--repeats", 1
    loss = measure("bench", "loss", *size, "--device", "cpu", "--out", tmp_path / "loss.md")
    assert [row["algorithm"] for row in loss["rows"]] == ["dense", "gram"]
    assert "| gram torch |" in (tmp_path / "loss.md").read_text()


def test_exported_backbone_evaluates_like_its_checkpoint(
    root: Path, demo_result: dict, checkpoint: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "backbone.safetensors"
    assert "resnet18" in succeed("export", checkpoint, exported)
    options = ["--image-size", 32, "--resize", 32, "--batch-size", 8, "--workers", 0, "--k", 3]
    result = measure("eval", "knn", exported, root / "train.beton", root / "val.beton", *options)
    assert result["figures"]["top1"] == demo_result["accuracies"]["trained network"]["kNN"]


def test_settings_come_from_the_weights_and_not_from_a_file_beside_them(
    root: Path, checkpoint: Path, tmp_path: Path
) -> None:
    data = root / "train.beton", root / "val.beton"
    moved, exported = tmp_path / "moved.pt", tmp_path / "backbone.pth"
    shutil.copy(checkpoint, moved)
    succeed("export", checkpoint, exported)
    (tmp_path / "config.yaml").write_text("of another run")
    assert measure("eval", "knn", moved, *data)["settings"]["features"] == RECIPE["eval"]["features"]
    built_in = EvalConfig().features.model_dump() | {"workers": 0}
    result = measure("eval", "knn", exported, *data, "--k", 3, "--workers", 0)
    assert result["settings"]["features"] == built_in
    assert "short side 40 px, then 32 px." in succeed("eval", "knn", moved, *data, "--resize", 40)


def test_eval_help_names_the_built_in_defaults() -> None:
    defaults = EvalConfig()
    # `also_k` has no option of its own: it is all but the first --k.
    sections = {
        "knn": defaults.knn.model_dump(exclude={"also_k"}),
        "linear": defaults.linear.model_dump(exclude={"lr", "weight_decay"})
        | defaults.linear_fast.model_dump(include={"passes"}),
        "semisup": defaults.semisup.model_dump(),
    }
    helps = {name: helps_of(name) for name in sections}
    for protocol, settings in sections.items():
        for name, value in (settings | defaults.features.model_dump()).items():
            assert helps[protocol][name].endswith(f"; default: the run's own, or {value}."), name
    for mode in (defaults.linear, defaults.linear_fast):
        assert (mode.epochs, mode.batch_size, mode.seed) == (100, 256, 0)
    lr, decay = (helps["linear"][name] for name in ("lr", "weight_decay"))
    grid = defaults.linear_fast
    assert (
        f"or {defaults.linear.lr}, or six from {min(grid.lr)} to {max(grid.lr):g}" in lr and len(grid.lr) == 6
    )
    assert f"or {defaults.linear.weight_decay}, or 0, 1e-06 and 0.0001" in decay
    assert grid.weight_decay == (0, 1e-06, 0.0001)


def helps_of(protocol: str) -> dict[str, str]:
    """Of each option of the command."""
    command = typer.main.get_command(eval_app).commands[protocol]
    return {parameter.name: getattr(parameter, "help", "") for parameter in command.params}


def test_unreadable_eval_settings_get_one_sentence(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["config"]["eval"]["knn"]["of_another_version"] = 1
    torch.save(state, tmp_path / "other.pt")
    sentence = refuse("eval", "knn", tmp_path / "other.pt", root / "train.beton", root / "val.beton")
    assert "eval.knn.of_another_version" in sentence and "export" in sentence


def test_bad_folders_get_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "x.beton"
    assert str(tmp_path / "absent") in refuse("convert", tmp_path / "absent", out)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refuse("convert", tmp_path / "empty", out)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(b"x")
    assert "a.jpg: not an image" in refuse("convert", tmp_path / "flat", out)


@pytest.mark.parametrize("folder", ["absent", "empty", "mixed"])
def test_pretraining_on_a_bad_folder_gets_one_sentence(root: Path, tmp_path: Path, folder: str) -> None:
    if folder != "absent":
        (tmp_path / folder).mkdir()
    if folder == "mixed":
        (tmp_path / folder / "class").mkdir()
        for place in (tmp_path / folder, tmp_path / folder / "class"):
            (place / "a.jpg").write_bytes(b"x")
    sentence = refuse("pretrain", root / "tiny.yaml", f"data.path={tmp_path / folder}")
    assert str(tmp_path / folder) in sentence


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epoch=3", "train.epochs"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=0", "train.epochs"),
        ("model.backbone=resnet19", "resnet18"),
        ("train.epochs", "key.sub=value"),
        ("train.batch_size=99", "larger than the dataset of 18"),
    ],
)
@pytest.mark.parametrize("command", [["pretrain"], ["profile"]], ids=" ".join)
def test_bad_settings_get_one_sentence(root: Path, command: list[str], override: str, expected: str) -> None:
    run_dir = f"run_dir={root / 'unused'}"
    assert expected in refuse(*command, root / "tiny.yaml", run_dir, override)
    assert not (root / "unused").exists()


def test_missing_recipe_gets_one_sentence(tmp_path: Path) -> None:
    assert str(tmp_path / "no.yaml") in refuse("pretrain", tmp_path / "no.yaml")
    assert str(tmp_path / "no.yaml") in refuse("demo", "--out", tmp_path, "--config", tmp_path / "no.yaml")


def test_beton_that_is_cut_short_gets_one_sentence(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole = (root / "train.beton").read_bytes()
    cut = tmp_path / "cut.beton"
    cut.write_bytes(whole[: len(whole) // 2])
    for loader in ("folder", "ffcv", "dali"):
        overrides = f"data.path={cut}", f"data.loader={loader}", f"run_dir={tmp_path / 'run'}"
        assert str(cut) in refuse("pretrain", root / "tiny.yaml", *overrides)
    assert str(cut) in refuse("eval", "knn", checkpoint, cut, root / "val.beton")


def test_checkpoint_of_another_architecture_gets_one_sentence(root: Path, checkpoint: Path) -> None:
    sentence = refuse("pretrain", root / "tiny.yaml", "model.backbone=resnet34", "train.epochs=2")
    assert "model.backbone" in sentence and str(checkpoint) in sentence


@pytest.mark.parametrize("command", [["eval", "knn"], ["eval", "linear"]], ids=" ".join)
def test_bad_checkpoints_get_one_sentence(
    root: Path, checkpoint: Path, tmp_path: Path, command: list[str]
) -> None:
    data = root / "train.beton", root / "val.beton"
    assert str(tmp_path / "no.pt") in refuse(*command, tmp_path / "no.pt", *data)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    assert str(cut) in refuse(*command, cut, *data)
    assert "Cannot read the weights .:" in refuse(*command, ".", *data)


def test_export_of_a_missing_checkpoint_gets_one_sentence(tmp_path: Path) -> None:
    assert str(tmp_path / "no.pt") in refuse("export", tmp_path / "no.pt", tmp_path / "x.pth")


def test_bad_options_get_one_sentence(root: Path, checkpoint: Path) -> None:
    data = root / "train.beton", root / "val.beton"
    assert "eval.knn.k" in refuse("eval", "knn", checkpoint, *data, "--k", 0)
    assert "eval.knn.k" in refuse("eval", "knn", checkpoint, *data, "--k", 1000)
    assert "image_size" in refuse("eval", "knn", checkpoint, *data, "--image-size", 64)
    assert "--mode fast" in refuse("eval", "linear", checkpoint, *data, "--passes", 1)
    assert "--lr is given 2 times" in refuse("eval", "linear", checkpoint, *data, "--lr", 1, "--lr", 2)
    assert "eval.linear_fast.lr" in refuse("eval", "linear", checkpoint, *data, "--mode", "fast", "--lr", 0)
    assert "--percent or --list" in refuse("eval", "semisup", checkpoint, *data)
    assert "at most 100, not 101" in refuse("eval", "semisup", checkpoint, *data, "--percent", 101)
    assert "larger percentage" in refuse("eval", "semisup", checkpoint, *data, "--percent", 1)
    assert "no.txt" in refuse("eval", "semisup", checkpoint, *data, "--list", "no.txt")
    assert "folder, ffcv" in refuse("bench", "loader", root / "images" / "train", "--only", "fastest")


def test_unknown_exceptions_stay_visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("tools.export.export_backbone", fail)
    assert isinstance(call("export", tmp_path / "a", tmp_path / "b").exception, RuntimeError)


def test_interrupt_ends_with_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.export.export_backbone", interrupt)
    result = call("export", tmp_path / "a", tmp_path / "b")
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def test_interrupted_pretraining_says_how_to_go_on(root: Path, tmp_path: Path) -> None:
    overrides = f"run_dir={tmp_path / 'run'}", "train.epochs=100000"
    process = in_a_process("pretrain", root / "tiny.yaml", *overrides)
    try:
        assert process.stderr.readline().startswith("Loss for 8 samples of width ")
        assert process.stderr.readline().startswith("step 1/200000  loss ")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("Interrupted; ") and str(tmp_path / "run") in errors


def test_mistake_of_several_processes_is_told_once(root: Path, tmp_path: Path) -> None:
    overrides = f"run_dir={tmp_path / 'run'}", "train.batch_size=9"
    process = in_a_process("pretrain", root / "tiny.yaml", *overrides, "--procs", 2)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 2, errors
    assert len(errors.splitlines()) == 1 and "multiple of 2" in errors
    assert output == ""


def test_torchrun_trains_and_only_rank_0_speaks(root: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = in_a_process(
        "pretrain", root / "tiny.yaml", f"run_dir={tmp_path / 'run'}", "--json", launcher=torchrun
    )
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    (result,) = output.splitlines()
    assert json.loads(result)["step"] == 2
    assert [line.split("  ")[0] for line in errors.splitlines() if line.startswith("step ")] == [
        "step 1/2",
        "step 2/2",
    ]


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_progress_is_shown_by_rank_0_only(
    root: Path, monkeypatch: pytest.MonkeyPatch, rank: str, shown: bool
) -> None:
    def pretrain(config: RunConfig, on_step: Callable[[StepReport], None] | None) -> RunResult:
        assert (on_step is not None) == shown
        return RunResult(config.run_dir / "checkpoint.pt", 2, 2, None)

    opened: list[str] = []

    @contextmanager
    def training_progress() -> Iterator[Callable[[StepReport], None]]:
        opened.append(rank)
        yield lambda report: None

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("train.loop.pretrain", pretrain)
    monkeypatch.setattr("tools.cli_pretrain.training_progress", training_progress)
    assert bool(succeed("pretrain", root / "tiny.yaml")) == shown
    assert bool(opened) == shown


def test_progress_line_tells_speed_loss_and_time_left() -> None:
    report = StepReport(30, 200, 1, 12.345, 10.0, 460.0, 0.1, 0.01, 321.6, 0.25, 0, 60.0, 3725.4)
    assert describe_step(report) == (
        "step 30/200  loss 12.35 (invariance 10, redundancy 460)  lr 0.1  322 pairs/s  data wait 25%  "
        "1:02:05 left"
    )


def test_progress_on_a_terminal_shows_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    terminal = Console(file=io.StringIO(), force_terminal=True, width=160)
    monkeypatch.setattr(console, "Console", lambda **options: terminal)
    report = StepReport(30, 200, 1, 12.345, 10.0, 460.0, 0.1, 0.01, 321.6, 0.25, 0, 60.0, 3725.4)
    with console.training_progress() as show:
        show(report)
    assert describe_step(report) in terminal.file.getvalue()
