"""Our results in the paper's tables, beside the published rows.

A figure is shown only from a result file that says which checkpoint, protocol, data and settings it is of.

1. find the result files, and say of what is none why
2. find each one's columns, or why it belongs into none: another protocol, other data
3. one row per checkpoint and table, with what its settings differ in from the published ones
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from tools.published import ARCHITECTURE, PUBLISHED, SUBSETS, TABLES, Column, Published

SHORT_HASH = 12  # characters
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Result:
    """A result file and what it says."""

    file: str
    record: Mapping[str, Any]

    @property
    def protocol(self) -> str:
        return self.record["protocol"]

    @property
    def checkpoint(self) -> str:
        return f"{Path(self.record['checkpoint']).name} {self.record['checkpoint_sha256'][:SHORT_HASH]}"


@dataclass
class OurRow:
    """A checkpoint's figures in a table, in percent by heading."""

    checkpoint: str
    sha256: str
    percentages: dict[str, float] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OtherRow:
    """A result that belongs into no table of the paper, and why."""

    result: Result
    reason: str


@dataclass(frozen=True)
class Report:
    """Our rows by the number of the table, other results, and files that are no results."""

    ours: dict[int, list[OurRow]]
    others: list[OtherRow]
    refused: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, published rows included."""
        return {
            "tables": [
                {
                    "number": table.number,
                    "title": table.title,
                    "columns": [asdict(column) for column in table.columns],
                    "published": [asdict(row) for row in table.rows],
                    "ours": [asdict(row) for row in self.ours[table.number]],
                }
                for table in TABLES
            ],
            "others": [
                {"file": row.result.file, "reason": row.reason, **row.result.record} for row in self.others
            ],
            "refused": self.refused,
        }


def build_report(paths: Sequence[Path]) -> Report:
    """From result files, and folders in which they are sought at any depth.

    Raises `DataError` where a path does not exist, or a file that is named itself is no result.
    """
    results, refused = _find(paths)  # 1
    report = Report({table.number: [] for table in TABLES}, [], refused)
    for result in results:
        reason = _why_not(result.record)  # 2
        if reason:
            report.others.append(OtherRow(result, reason))
            continue
        for table in TABLES:
            cells = _cells(result.record, table.columns)
            if cells:
                _enter(report.ours[table.number], result, cells)  # 3
    return report


def _find(paths: Sequence[Path]) -> tuple[list[Result], dict[str, str]]:
    results, refused = {}, {}
    for path in paths:
        if not path.exists():
            raise DataError(f"There is no {path}; pass result files or folders of runs.")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            record, reason = _read(file)
            if record is not None and not reason:
                results[file.resolve()] = Result(str(file), record)
            elif not path.is_dir():
                raise DataError(f"{file} is no result of an evaluation: {reason}.")
            elif record is not None:  # else it is some other file
                refused[str(file)] = reason
    return list(results.values()), refused


def _read(file: Path) -> tuple[dict[str, Any] | None, str]:
    """The record, or None where the file does not even seem to be one; and what is wrong with it, or ""."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None, "it is not JSON"
    if not isinstance(record, dict) or not {"protocol", "figures"} <= record.keys():
        return None, "it has no protocol and figures"
    return record, next(_faults(record), "")


def _faults(record: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(record["protocol"], str):
        yield "its protocol is no name"
    if (
        not SHA256.fullmatch(str(record.get("checkpoint_sha256")))
        or type(record.get("checkpoint")) is not str
    ):
        yield "it does not say which checkpoint was evaluated"
    if not isinstance(record.get("settings"), dict):
        yield "it does not say with which settings"
    data = record.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("test"), dict):
        yield "it does not say on which data"
    elif not all(
        isinstance(of, dict) and all(type(of.get(key)) is int for key in ("images", "classes"))
        for of in data.values()
    ):
        yield "it does not say on how many images of how many classes"
    figures = record["figures"]
    if not isinstance(figures, dict) or not figures or not all(map(_is_share, figures.values())):
        yield "its figures are not shares from 0 to 1"


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 1


def _why_not(record: Mapping[str, Any]) -> str:
    """Why a result belongs into none of the paper's columns, or ""."""
    published = PUBLISHED.get(record["protocol"])
    if published is None:
        return f"the paper has no protocol {record['protocol']}"
    faults = list(_data_faults(record["data"], published))
    if faults:
        return f"not the paper's data ({published.data}): {'; '.join(faults)}"
    if any(_cells(record, table.columns) for table in TABLES):
        return ""
    if record["protocol"] == "semisup":
        return (
            f"not 1 % or 10 % of the labels, but {record['settings'].get('percent')} % by the settings and "
            f"{record['data']['train']['images']:,} images"
        )
    return "none of its figures is in the paper"


def _data_faults(data: Mapping[str, Any], published: Published) -> Iterator[str]:
    test, train = data["test"], data.get("train")
    if (test["images"], test["classes"]) != (published.test, published.classes):
        yield (
            f"tested on {test['images']:,} images of {test['classes']:,} classes, "
            f"not {published.test:,} of {published.classes:,}"
        )
    if train is None:
        yield "the data that was learned from is not stated"
        return
    is_as_many = any(train["images"] in counts for counts in published.train)
    if not is_as_many or train["classes"] != published.classes:
        wanted = " or ".join(f"{counts[len(counts) // 2]:,}" for counts in published.train)
        yield (
            f"learned from {train['images']:,} images of {train['classes']:,} classes, "
            f"not {wanted} of {published.classes:,}"
        )


def _cells(record: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, float]:
    """In percent by heading: the columns that the record fills."""
    return {
        column.heading: 100 * record["figures"][column.figure]
        for column in columns
        if column.protocol == record["protocol"]
        and column.figure in record["figures"]
        and (column.percent is None or _is_of_percent(record, column.percent))
    }


def _is_of_percent(record: Mapping[str, Any], percent: int) -> bool:
    """Whether settings and number of images agree that these are that percentage of the labels."""
    return (
        record["settings"].get("percent") == percent and record["data"]["train"]["images"] in SUBSETS[percent]
    )


def _enter(rows: list[OurRow], result: Result, cells: dict[str, float]) -> None:
    """Into the checkpoint's row, or one of its own where that has other figures of the same columns."""
    sha256 = result.record["checkpoint_sha256"]
    mine = (row for row in rows if row.sha256 == sha256 and not row.percentages.keys() & cells.keys())
    row = next(mine, None)
    if row is None:
        row = OurRow(result.checkpoint, sha256)
        rows.append(row)
    row.percentages |= cells
    row.files.append(result.file)
    row.notes += [
        f"{result.protocol}: {note}" for note in _differences(result.record, PUBLISHED[result.protocol])
    ]


def _differences(record: Mapping[str, Any], published: Published) -> Iterator[str]:
    """What network and settings differ in from the published ones, as far as these are known."""
    architecture = record.get("architecture", "a network that is not stated")
    if architecture != ARCHITECTURE:
        yield f"{architecture} instead of {ARCHITECTURE}"
    settings = dict(_flat(record["settings"]))
    for name, wanted in published.settings.items():
        found = [value for key, value in settings.items() if f".{key}".endswith(f".{name}")]
        if not found:
            yield f"{name} not stated"
        elif any(value not in wanted for value in found):
            yield f"{name} {', '.join(map(str, found))} instead of {' or '.join(map(str, wanted))}"


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value
