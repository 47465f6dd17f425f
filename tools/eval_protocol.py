"""From the options of a `fastbarlow eval` command to its result: every protocol of `eval.run`."""

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.console import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    leave,
    progress_bar,
    say,
    show_json,
    show_result,
)
from tools.eval_options import ImageOptions, Options, OutputOptions, RankOptions, eval_settings

if TYPE_CHECKING:
    from tools.evaluate import EvalJob


def run_protocol(
    protocol: str,
    checkpoint: Path,
    train: Path,
    test: Path,
    options: Options,
    images: ImageOptions,
    ranks: RankOptions,
    output: OutputOptions,
    kind: str | None = None,
    place: Path | None = None,
    **which: Any,
) -> dict[str, Any] | None:
    """Run the protocol and tell its result, which it gives back on the first rank.

    `kind` and `place` are what its file is named after, by default protocol and `test`; `which` is for
    `EvalJob`.
    """
    from model.weights import read_weights
    from tools.evaluate import EvalJob
    from tools.results import default_place

    config = eval_settings(read_weights(checkpoint), checkpoint, options | images.given())
    out = output.out or default_place(checkpoint, kind or protocol, place or test)
    job = EvalJob(protocol, checkpoint, train, test, config, output.device, out, ranks.work, **which)
    record = _run(job, ranks.procs)
    if record is None:
        return None
    show_result(record, as_json=output.as_json)
    learnt_from, tested_on = record["data"]["train"], record["data"]["test"]
    say(
        f"{learnt_from['images']:,} labelled images, {tested_on['images']:,} to classify, "
        f"{tested_on['classes']} classes; short side {config.features.resize} px, then "
        f"{config.features.image_size} px. Written to {out}.",
        as_json=output.as_json,
    )
    if "chosen" in record["settings"]:
        chosen = record["settings"]["chosen"]
        say(
            f"Chosen: learning rate {chosen['lr']:g}, weight decay {chosen['weight_decay']:g}.",
            as_json=output.as_json,
        )
    if output.as_json:
        show_json(record)
    return record


def _run(job: "EvalJob", procs: int | None) -> dict[str, Any] | None:
    """The result's record; None on other ranks than the first."""
    from tools.evaluate import run_job
    from tools.work_folder import StoppedError
    from train.launch import default_processes, launch_ranks, show_notes

    show_notes()
    num_processes = 1 if "RANK" in os.environ else procs or default_processes(job.device)
    is_main = int(os.environ.get("RANK", 0)) == 0
    try:
        with progress_bar(f"eval {job.protocol}") if is_main else nullcontext() as bar:
            on_progress = (lambda report: bar(*report)) if is_main else None
            run = partial(run_job, job)
            record = launch_ranks(run, num_processes, on_progress) if num_processes > 1 else run(on_progress)
    except StoppedError as error:
        leave(str(error), EXIT_PREEMPTED)
    except KeyboardInterrupt:
        leave("Interrupted; the same command goes on from what was finished.", EXIT_INTERRUPTED)
    return record if is_main else None
