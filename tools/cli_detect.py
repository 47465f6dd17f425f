"""`fastbarlow eval detect`: object detection and instance segmentation from a backbone."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tools.console import EXIT_INTERRUPTED, EXIT_PREEMPTED, leave, say, show_json, show_result
from tools.options import Checkpoint, Device, Json, ResultFile

if TYPE_CHECKING:
    from eval.detection.config import DetectionConfig
    from eval.detection.reports import DetectionReport, PhaseReport
    from tools.detect import DetectionJob

LINE_SECONDS = 10  # between two lines about a phase, where standard error is no terminal


def detect(
    protocol: Annotated[
        Literal["voc", "coco"], typer.Argument(metavar="PROTOCOL", help="voc or coco.", show_default=False)
    ],
    checkpoint: Checkpoint,
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the dataset, as unpacked.")],
    iterations: Annotated[
        int | None,
        typer.Option(
            help="In place of 24,000 (voc) or 90,000 (coco); the steps of the schedule move along with it."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of an iteration, of all processes; default 16.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default 0.1 (voc) or 0.03 (coco).")] = None,
    short_side: Annotated[
        int | None,
        typer.Option(help="Pixels; default: drawn from 480 (voc) or 640 (coco) to 800, in tests 800."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Decoding processes of a rank; default 4.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of new layers and all draws; default 0.")] = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="Local processes; default one per GPU, or 1 without a GPU.")
    ] = None,
    device: Device = "auto",
    out: ResultFile = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a detector that starts from the backbone, and test it.

    voc: Faster R-CNN on VOC07+12, tested on VOC2007's test set. ROOT holds VOC2007/ and VOC2012/, or
    VOCdevkit/ with them. Prints AP, AP50 and AP75 by VOC 2007's rules.

    coco: Mask R-CNN on COCO 2017. ROOT holds train2017/, val2017/ and annotations/. Prints AP, AP50 and AP75
    of boxes and of masks.

    Both take the C4 backbone and the schedule of the paper (appendix C.2), for which they need GPUs. Under
    torchrun each process joins the run, and --procs does not count.

    The detector is saved every ten minutes, and when SIGTERM or SIGUSR1 ends the run, with exit code 75; the
    same command goes on from there. It lies beside the result, as a .pt file.

    Examples

        fastbarlow eval detect voc runs/a/checkpoint.pt VOCdevkit
        fastbarlow eval detect coco resnet50.pth coco --procs 8
        fastbarlow eval detect voc runs/a/checkpoint.pt VOCdevkit --iterations 2400 --short-side 400
    """
    from tools.detect import DetectionJob, Stopped, run_detection
    from tools.results import default_place
    from train.errors import ConfigError
    from train.launch import default_processes, launch_ranks, show_notes

    given = {"batch_size": batch_size, "lr": lr, "workers": workers, "seed": seed}
    config = _settings(protocol, iterations, short_side, given)
    out = out or default_place(checkpoint, f"detect-{protocol}", root.resolve())
    if out.suffix == ".pt":  # where the detector goes
        raise ConfigError(f"--out {out} must not end in .pt; name a .json file.")
    job = DetectionJob(protocol, checkpoint, root, config, device, out)
    show_notes()
    num_processes = 1 if "RANK" in os.environ else procs or default_processes(device)
    is_main = int(os.environ.get("RANK", 0)) == 0
    try:
        with _progress() if is_main else nullcontext() as on_report:
            run = partial(run_detection, job)
            result = launch_ranks(run, num_processes, on_report) if num_processes > 1 else run(on_report)
    except KeyboardInterrupt:
        leave(f"Interrupted; the same command goes on from {job.detector}, if it is there.", EXIT_INTERRUPTED)
    if isinstance(result, Stopped):
        if is_main:
            say(
                f"Stopped by {result.by} after iteration {result.iteration}, which is saved in "
                f"{job.detector}; the same command goes on from there.",
                as_json=True,
            )
        raise typer.Exit(EXIT_PREEMPTED)
    if is_main:
        _tell(result, job, as_json=as_json)


def _settings(
    protocol: str, iterations: int | None, short_side: int | None, given: dict[str, Any]
) -> "DetectionConfig":
    """The published settings, with the options that were given in their place."""
    from pydantic import ValidationError

    from eval.detection.config import PUBLISHED, DetectionConfig
    from train.errors import ConfigError

    for name, value, least in (("--iterations", iterations, 1), ("--short-side", short_side, 32)):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}.")
    config = PUBLISHED[protocol]
    config = config if iterations is None else config.with_iterations(iterations)
    config = config if short_side is None else config.with_short_side(short_side)
    settings = config.model_dump() | {name: value for name, value in given.items() if value is not None}
    try:
        return DetectionConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        rule = first["msg"].replace("Input should", "should")
        raise ConfigError(f"{option}: {rule}, not {first['input']!r}; change the option.") from None


def _tell(record: dict[str, Any], job: "DetectionJob", *, as_json: bool) -> None:
    show_result(record, as_json=as_json)
    data = record["data"]
    say(
        f"{data['train']['images']:,} images to learn from, {job.config.iterations:,} iterations of "
        f"{job.config.batch_size}; {data['test']['images']:,} to test. Written to {job.out}, the detector to "
        f"{job.detector}.",
        as_json=as_json,
    )
    if as_json:
        show_json(record)


@contextmanager
def _progress() -> Iterator[Callable[["DetectionReport | PhaseReport"], None]]:
    """Shows reports on standard error: a line that changes on a terminal, a line for each elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    from eval.detection.reports import PhaseReport

    console = Console(stderr=True)
    if not console.is_terminal:
        last = -float("inf")

        def print_line(report: "DetectionReport | PhaseReport") -> None:
            nonlocal last
            now = time.monotonic()
            if isinstance(report, PhaseReport):
                if now < last + LINE_SECONDS and report.done < report.total:
                    return
                last = now
            print(_describe(report), file=sys.stderr, flush=True)

        yield print_line
        return
    columns = BarColumn(bar_width=16), TextColumn("{task.description}", table_column=Column())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("waiting for the first iterations", total=None)

        def update(report: "DetectionReport | PhaseReport") -> None:
            of_phase = isinstance(report, PhaseReport)
            done, total = (report.done, report.total) if of_phase else (report.iteration, report.iterations)
            progress.update(task, completed=done, total=total, description=_describe(report))

        yield update


def _describe(report: "DetectionReport | PhaseReport") -> str:
    """One line: progress, loss and its terms, rate, speed, waiting, time left."""
    from eval.detection.reports import PhaseReport

    left = f"{timedelta(seconds=round(report.seconds_left))} left"
    if isinstance(report, PhaseReport):
        return f"{report.phase} {report.done}/{report.total}  {report.per_second:.1f}/s  {left}"
    terms = ", ".join(f"{name} {value:.3g}" for name, value in report.terms.items())
    return (
        f"iteration {report.iteration}/{report.iterations}  loss {report.loss:.4g} ({terms})  "
        f"lr {report.lr:.3g}  {report.images_per_second:.1f} images/s  "
        f"data wait {report.data_wait_share:.0%}  {left}"
    )
