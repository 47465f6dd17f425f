"""`fastbarlow audit`: what governance asks of an embedding; `fastbarlow eval report`: the paper's tables."""

import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.console import progress_bar, say, show_json, show_table
from tools.eval_options import ImageOptions, eval_settings, grouped
from tools.options import Checkpoint, Device, Json

if TYPE_CHECKING:
    from eval.audit.run import Audit
    from eval.audit.sample import Encoder


@grouped
def audit(
    checkpoint: Checkpoint,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Images, labelled or not: a .beton file, a folder, torchvision:NAME:ROOT."
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="OTHER", help="The encoder in use, which CHECKPOINT is to replace."),
    ] = None,
    attributes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="Attributes of the images: a column 'name', the number of a sample or the end of its path, "
            "and a column for each attribute.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=20, help="Look at no more images, drawn by the seed.")] = 2_000,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the draw, the distortions and the probes.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for audit.json and audit.html.",
            show_default="audit-CHECKPOINT-DATA/, beside the checkpoint",
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    *,
    pixels: ImageOptions,
) -> None:
    """Look at what an encoder makes of images, before anybody relies on it.

    Shows nearest neighbours and the worst of them; accuracy by class and by subgroup, with intervals; which
    distortions the features ignore, by strength; which attributes a linear classifier can read from them;
    dead and redundant dimensions. With --against OTHER also how far the two encoders agree, and whether
    CHECKPOINT may replace OTHER without a word.

    Parts that need labels or attributes are left out where there are none, and the page says so.

    Examples

        fastbarlow audit runs/b/checkpoint.pt val.beton --against runs/a/checkpoint.pt
        fastbarlow audit resnet50.pth photos/ --attributes cameras.csv --images 5000 --out audit/
    """
    from eval.audit.config import AuditConfig
    from eval.audit.run import audit as look_at
    from pipelines.source import open_source
    from tools.audit_page import audit_page, summary_of
    from tools.audit_record import audit_record, prepare, write_audit
    from tools.environment import describe_environment
    from tools.results import file_hash
    from train.distributed import process_group

    config = AuditConfig(images=images, seed=seed)
    encoder = _encoder(checkpoint, pixels)
    other = _encoder(against, pixels) if against else None
    out = out or checkpoint.parent / f"audit-{checkpoint.stem}-{data.stem}"
    prepare(out)
    with process_group(device) as world:
        found = look_at(
            encoder,
            open_source(data),
            config,
            world.device,
            progress_bar,
            against=other,
            attributes=attributes,
        )
        environment = describe_environment(world.device)
    said = {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": file_hash(checkpoint),
        "against": str(against) if against else None,
        "against_sha256": file_hash(against) if against else None,
        "date": date.today().isoformat(),
    }
    record = {**said, "environment": environment, **audit_record(found, config, encoder.features)}
    settings = {name: str(value) for name, value in said.items() if value is not None}
    settings |= {name: json.dumps(value) for name, value in record["settings"].items()} | environment
    write_audit(record, audit_page(found, config, f"Audit of {checkpoint}", settings), out)
    _show(found, as_json=as_json)
    say(summary_of(found), as_json=as_json)
    say(f"Look at {out / 'audit.html'}", as_json=as_json)
    if as_json:
        show_json(record)


def _encoder(checkpoint: Path, pixels: ImageOptions) -> "Encoder":
    from eval.audit.sample import Encoder
    from model.weights import read_weights

    weights = read_weights(checkpoint)
    features = eval_settings(weights, checkpoint, pixels.given()).features
    return Encoder(weights.build(), weights.normalisation, features)


def _show(found: "Audit", *, as_json: bool) -> None:
    """The distortions that it minds most, and what can be read, in two tables."""
    curves = sorted(found.invariance.curves, key=lambda curve: min(curve.ignored))
    rows = [("distortion", "ignored, of 100 %, where it matters most")]
    rows += [(curve.name, f"{min(curve.ignored):.0%}") for curve in curves]
    show_table("Distortions: 0 % is as unlike as two images", rows, as_json=as_json)
    rows = [("attribute", "balanced accuracy", "95 %", "constant", "shuffled")]
    rows += [
        (
            leak.name,
            f"{leak.balanced_accuracy:.1%}",
            f"{leak.low:.1%} to {leak.high:.1%}",
            f"{leak.chance:.1%}",
            f"{leak.shuffled:.1%}",
        )
        for leak in found.leaks
    ]
    if found.leaks:
        show_table("What a linear classifier reads from the features", rows, as_json=as_json)
    for line in found.left_out:
        say(f"Left out: {line}", as_json=as_json)


def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RESULTS", help="Result files, or folders in which they are sought, such as runs."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write, .html or .md.")] = Path(
        "eval-report.html"
    ),
    as_json: Json = False,
) -> None:
    """Show our results in the tables of the paper, beside the published rows.

    Takes the JSON files that the other commands of eval write. A result on other data than the paper's, or
    by another protocol, goes into a table of its own, never into a column of the paper; settings that differ
    from the published ones are stated in the row. What has not been run stays empty.

    Examples

        fastbarlow eval report runs --out results.html
        fastbarlow eval report runs/a runs/b/eval/checkpoint-linear-val.json --out RESULTS.md
    """
    from pipelines.errors import DataError
    from tools.eval_report import build_report
    from tools.eval_report_page import report_markdown, report_page, summary_of
    from train.files import write_text_atomically

    if out.suffix not in (".html", ".md"):
        raise DataError(f"Cannot write {out}: the name must end in .html or .md.")
    found = build_report(results or [])
    page = report_page(found) if out.suffix == ".html" else report_markdown(found)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out, page)
    except OSError as error:
        raise DataError(f"Cannot write {out}: {error.strerror}; choose another place with --out.") from error
    say(summary_of(found), as_json=as_json)
    say(f"Look at {out}", as_json=as_json)
    if as_json:
        show_json(found.as_dict())
