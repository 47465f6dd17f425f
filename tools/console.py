"""What the commands write to the terminal: errors, progress, tables and JSON."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from train.errors import USER_ERRORS
from train.metrics import StepReport

EXIT_SHORTFALL, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130
EXIT_PREEMPTED = 75  # sysexits.h: EX_TEMPFAIL, a failure that passes; schedulers can be told to requeue on it

LINE_SECONDS = 30  # between two lines about progress, where there is no terminal

Progressor = Callable[..., None]  # done, total or None, and what is being done where that changes


class Commands(TyperGroup):
    """Turns an error that is meant for the user into its sentence and exit code 2, without a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            leave(str(error), EXIT_USER_ERROR)
        except KeyboardInterrupt:
            leave("Interrupted.", EXIT_INTERRUPTED)


def leave(sentence: str, code: int) -> NoReturn:
    """End the command with one line on standard error."""
    print(" ".join(sentence.splitlines()), file=sys.stderr)
    raise typer.Exit(code)


def show_json(result: dict[str, Any]) -> None:
    """The machine-readable result: one line, the last on standard output."""
    print(json.dumps(result))


def say(text: str, *, as_json: bool = False) -> None:
    """A line for people; on standard error where standard output belongs to the JSON."""
    print(text, file=sys.stderr if as_json else sys.stdout)


def show_table(title: str, rows: Sequence[Sequence[str]], *, as_json: bool = False) -> None:
    """A title and `rows`, the first of them the header; the first column names the rows."""
    console = Console(stderr=as_json)
    console.print(title, markup=False, highlight=False)
    table = Table()
    header, *body = rows
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position else "left")
    for row in body:
        table.add_row(*row)
    console.print(table)


def show_result(record: Mapping[str, Any], *, as_json: bool = False) -> None:
    """The figures of an evaluation; see `tools.results` for its record."""
    protocol, figures = record["protocol"], record["figures"]
    rows = [("", *figures), (protocol, *(f"{share:.2%}" for share in figures.values()))]
    show_table(f"{protocol} on {record['data']['test']['path']}", rows, as_json=as_json)


@contextmanager
def progress_bar(description: str) -> Iterator[Progressor]:
    """Done, rate and time left on standard error while the block runs; gives the function to move it.

    A bar on a terminal, elsewhere a line every `LINE_SECONDS`. A number of things done that is smaller than
    the last one begins something new.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(description)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=None)
        last: int | None = None

        def move(done: int, total: int | None, now: str = description) -> None:
            nonlocal last
            if last is None or done < last:  # what was done before the first report took no time
                progress.reset(task, total=total, completed=done)
            progress.update(task, completed=done, total=total, description=now)
            last = done

        yield move


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else _rate(speed))


class _Lines:
    """The same, where there is no terminal."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._begun = self._told = 0.0
        self._first = self._last = -1  # done at the beginning and at the last call

    def __call__(self, done: int, total: int | None, now: str | None = None) -> None:
        clock = time.monotonic()
        if self._first < 0 or done < self._last:
            self._begun = self._told = clock
            self._first = done
        self._last = done
        if clock - self._told < LINE_SECONDS:
            return
        self._told = clock
        rate = (done - self._first) / (clock - self._begun)
        parts = [f"{now or self._description}: {done:,}"]
        parts[0] += "" if total is None else f" of {total:,}"
        parts.append(_rate(rate))
        if total is not None and rate > 0:
            parts.append(f"{timedelta(seconds=round((total - done) / rate))} left")
        print("  ".join(parts), file=sys.stderr, flush=True)


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}/s" if per_second >= 10 else f"{per_second:.2g}/s"


@contextmanager
def training_progress() -> Iterator[Callable[[StepReport], None]]:
    """Shows reports on standard error: a line that changes on a terminal, a line for each elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda report: print(describe_step(report), file=sys.stderr, flush=True)
        return
    # A column of its own making wraps on a narrow terminal; the default one would cut the line off.
    columns = BarColumn(bar_width=16), TextColumn("{task.description}", table_column=Column())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("waiting for the first step", total=None)
        yield lambda report: progress.update(
            task, completed=report.step, total=report.total_steps, description=describe_step(report)
        )


def describe_step(report: StepReport) -> str:
    """One line: progress, loss and its terms, rate, speed, waiting, use of the GPU, accuracy, time left."""
    per_gpu = report.pairs_per_second_per_gpu
    is_shared = per_gpu is not None and per_gpu < 0.99 * report.pairs_per_second
    loss_ms = report.phase_ms.get("loss")
    parts = [
        f"step {report.step}/{report.total_steps}",
        f"loss {report.loss:.4g} (invariance {report.invariance:.4g}, redundancy {report.redundancy:.4g})",
        f"lr {report.lr_weights:.3g}",
        f"{report.pairs_per_second:.0f} pairs/s" + (f" ({per_gpu:.0f} per GPU)" if is_shared else ""),
        f"data wait {report.data_wait_share:.0%}",
        _part("loss {:.3g} ms", loss_ms),
        _part("exposed {:.3g} ms", report.exposed_communication_ms),
        _part("MFU {:.0%}", report.mfu),
        _part("{:.1f} GiB", report.memory_gib),
        _part("scale {:g}", report.gradient_scale),
        _part("{:.0f} steps skipped", report.skipped_steps or None),
        _part("probe {:.1%}", report.probe_accuracy),
        _part("kNN {:.1%}", report.knn_accuracy),
        f"{timedelta(seconds=round(report.seconds_left))} left",
    ]
    return "  ".join(part for part in parts if part)


def _part(text: str, value: float | None) -> str:
    return "" if value is None else text.format(value)


def or_dash(value: float | None, form: str) -> str:
    """A cell of a table; a dash where there is nothing to show."""
    return "-" if value is None else format(value, form)
