"""`fastbarlow profile`: what limits the speed of a run on this machine, and what to change."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.console import progress_bar, say, show_json, show_table
from tools.options import Json, Overrides

if TYPE_CHECKING:
    from tools.profile.run import Progress


def profile(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="A YAML recipe, such as those in configs/.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each part, after a warm-up.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default run_dir/profile.")] = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="Local processes; default one per GPU, or 1 without a GPU.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="Measure nothing, but say what changed from A to B."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find out what limits the speed of a run on this machine, and which setting to change.

    Measures what each part can do alone: reading the dataset from the storage (not from the page cache, where
    the system lets it be dropped), decoding, cropping, distorting, copying to the GPU, the loader as a whole,
    the step on synthetic data, and with several ranks each collective. Then the real run, each step split
    into data wait, copy, distortions, forward, loss, backward, exposed communication, optimizer and idle.
    The phases are timed without waiting for the device. Data wait is how long a step stood still for want of
    a batch; exposed communication is what it waited for other ranks, including for one that is late. That
    one waits least itself, and is named with its machine and the likely cause.

    The ranks are started as by pretrain: --procs here, or torchrun. train.batch_size is the batch of all
    ranks. The run's checkpoint is neither read nor written.

    Also samples how busy cores and GPU are, and traces a few more steps: which kinds of kernels take the
    time, and how near they come to what the device was measured to reach.

    Writes report.html to look at, profile.json and the traces for ui.perfetto.dev into OUT.

    Examples

        fastbarlow profile configs/imagenet_rn50_1gpu.yaml data.loader=dali
        fastbarlow profile configs/cifar10_rn18.yaml train.device=cpu --procs 2 --steps 50 --json
        fastbarlow profile --compare before/profile.json after/profile.json
        torchrun --nproc-per-node 8 --no-python fastbarlow profile configs/imagenet_rn50_8xh100.yaml
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the tracer tells of its start; set before torch comes
    from tools.profile.result import check_writable
    from tools.profile.run import launch_profile, profile_run
    from tools.profile.summary import summary_tables
    from train.config import load_config
    from train.errors import ConfigError
    from train.launch import default_processes, show_notes
    from train.slurm import join_step

    if compare is not None:
        _compare(*compare, as_json=as_json)
        return
    if config is None:
        raise ConfigError("No recipe is given; name one, such as configs/demo.yaml, or use --compare.")
    run = load_config(config, overrides or [])
    out = out or run.run_dir / "profile"
    check_writable(out)
    show_notes()
    join_step()
    processes = 1 if "RANK" in os.environ else procs or default_processes(run.train.device)
    is_main = int(os.environ.get("RANK", 0)) == 0
    with _progress() if is_main else nullcontext() as on_progress:
        if processes > 1:
            result = launch_profile(run, steps, out, processes, on_progress)
        else:
            result = profile_run(run, steps, out, on_progress)
    if not is_main:
        return
    for title, rows in summary_tables(result):
        show_table(title, rows, as_json=as_json)
    say(f"Written to {out}.", as_json=as_json)
    for warning in result["utilisation"]["warnings"]:
        say(warning, as_json=as_json)
    say(result["verdict"]["sentence"], as_json=as_json)
    if as_json:
        show_json(result)


def _compare(before: Path, after: Path, *, as_json: bool) -> None:
    from tools.profile.compare import compare, comparison_sentence, comparison_tables
    from tools.profile.result import read_json

    result = compare(read_json(before), read_json(after))
    for title, rows in comparison_tables(result):
        show_table(title, rows, as_json=as_json)
    for name, sentence in zip(("Before", "After"), result["verdicts"], strict=True):
        say(f"{name}: {sentence}", as_json=as_json)
    say(comparison_sentence(result), as_json=as_json)
    if as_json:
        show_json(result)


@contextmanager
def _progress() -> Iterator[Callable[["Progress"], None]]:
    """On standard error: a bar of the part under way on a terminal, elsewhere a line for each part."""
    part = ""
    with progress_bar("measuring") as show:

        def on_progress(progress: "Progress") -> None:
            nonlocal part
            show(progress.done, progress.steps, f"measuring {progress.part}")
            if progress.part != part and not sys.stderr.isatty():
                say(f"measuring {progress.part}", as_json=True)
            part = progress.part

        yield on_progress
