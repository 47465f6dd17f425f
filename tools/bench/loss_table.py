"""The result of `fastbarlow bench loss` as tables for people."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.errors import ConfigError

Table = tuple[str, list[Sequence[str]]]  # title, rows; the first row is the header

LEGEND = """\
Forward and backward. The variants took turns, each with cold caches; `ms` is the median.
`/ products`: over the time of the algorithm's matrix products alone.
`peak MB`: beyond the inputs; the planned one is that of the implementation that takes more.
`error`: distance of the gradient from the definition's in float64, relative to its norm."""
CPU_RANKS = """\
The authors' `SyncBatchNorm` exists on GPUs only: on these CPU ranks their side has a plain batch-norm over
gloo."""


def loss_tables(result: dict[str, Any]) -> list[Table]:
    """For each number of samples what was measured, one variant a row, and what the plan expects."""
    tables = []
    for plan in result["plans"]:
        rows = [row for row in result["rows"] if row["n"] == plan["n"]]
        tables += [_measured(rows), _planned(plan)]
    return tables


def check_place(out: Path) -> None:
    """Raises `ConfigError` where no file can be written at `out`."""
    folder = out.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"Cannot write {out}: its folder does not exist; create it first.")
    if out.is_dir():
        raise ConfigError(
            f"Cannot write {out}: it is a folder; name a file in it, such as {out / 'loss.md'}."
        )
    if not os.access(out if out.exists() else folder, os.W_OK):
        raise ConfigError(f"Cannot write {out}: permission denied; choose another place.")


def write_page(result: dict[str, Any], out: Path) -> None:
    """Write `as_markdown` to `out`; raises `ConfigError` where that fails."""
    try:
        out.write_text(as_markdown(result), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot write {out}: {error.strerror}; choose another place.") from error


def as_markdown(result: dict[str, Any]) -> str:
    """A page with all tables, the date, the machine and the versions."""
    environment = dict(result["environment"])
    device, processor = environment.pop("device"), environment.pop("processor")
    machine = processor if device == "CPU" else f"{device}; {processor}"
    lines = [f"# Loss, {device}, {result['date']}", "", f"{machine}; "]
    lines[-1] += ", ".join(f"{name} {version}" for name, version in environment.items()) + "."
    lines += ["", LEGEND]
    if any(row["device"] == "cpu" and row["world"] > 1 for row in result["rows"]):
        lines += [CPU_RANKS]
    for title, (header, *body) in loss_tables(result):
        rows = [header, ["---", *["---:"] * (len(header) - 1)], *body]
        lines += ["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _measured(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    sent = "bytes_sent" in first
    table = [["variant", "ms", "min-max", "speedup", "/ products", "peak MB", "error"] + ["sent MB"] * sent]
    authors = ["authors' code", _ms(first["ms_authors"]), _range(first["all_ms_authors"]), "1", ""]
    authors += [_mb(first["peak_bytes_authors"]), _error(first["grad_rel_err_authors"])]
    table.append(authors + ([_mb(first["bytes_sent_authors"])] if sent else []))
    for row in rows:
        cells = [
            f"{row['algorithm']} {row['implementation']}",
            _ms(row["ms"]),
            _range(row["all_ms"]),
            f"{row['speedup']:.2f}",
            f"{row['over_products']:.2f}",
            _mb(row["peak_bytes"]),
            _error(row["grad_rel_err"]),
        ]
        table.append(cells + ([_mb(row["bytes_sent"])] if sent else []))
    ranks = f" on {first['world']} ranks" if first["world"] > 1 else ""
    where = f"{first['dtype']}, {first['device']}{ranks}"
    return f"N = {first['n']}, D = {first['d']}, {where}, median of {first['repeats']}", table


def _planned(plan: dict[str, Any]) -> Table:
    header = ["algorithm", "Gflop", "sent MB", "peak MB", "predicted ms"]
    rows = [
        [
            estimate["algorithm"],
            f"{estimate['flop'] / 1e9:.3g}",
            _mb(estimate["bytes_sent"]),
            _mb(estimate["peak_bytes"]),
            _ms(estimate["milliseconds"]),
        ]
        for estimate in plan["estimates"]
    ]
    return f"Planned for N = {plan['n']}: {plan['reason']}", [header, *rows]


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _range(values: Sequence[float]) -> str:
    return f"{_ms(min(values))}-{_ms(max(values))}"


def _mb(value: float) -> str:
    return f"{value / 1e6:,.0f}" if value >= 1e8 else f"{value / 1e6:.3g}"


def _error(value: float | None) -> str:
    return "overflow" if value is None else f"{value:.1e}"
