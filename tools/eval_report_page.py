"""The report of our results beside the paper's, as an HTML page or as Markdown."""

from collections.abc import Mapping, Sequence

from tools.eval_report import Report
from tools.published import PUBLISHED, TABLES, PaperTable
from tools.report import Section, render_report


def report_page(report: Report) -> str:
    """One HTML page with nothing to load from elsewhere."""
    sections = [
        Section(f"Table {table.number}: {table.title}", _text(table), table=_lines(table, report))
        for table in TABLES
    ]
    if report.others:
        text = "Results that belong into no column of the paper, and why."
        sections.append(Section("Other data and protocols", text, table=_other_lines(report)))
    if report.refused:
        text = "Files that were found, but are no results that one can trust."
        rows = [("file", "why"), *report.refused.items()]
        sections.append(Section("Left out", text, table=rows))
    return render_report("Results beside the paper's", summary_of(report), sections)


def report_markdown(report: Report) -> str:
    """The same as Markdown."""
    parts = ["# Results beside the paper's", summary_of(report)]
    for table in TABLES:
        parts += [f"## Table {table.number}: {table.title}", _text(table), _markdown(_lines(table, report))]
    if report.others:
        parts += ["## Other data and protocols", _markdown(_other_lines(report))]
    if report.refused:
        parts += ["## Left out", _markdown([("file", "why"), *report.refused.items()])]
    return "\n\n".join(parts) + "\n"


def summary_of(report: Report) -> str:
    """How many results there are, and where they went."""
    files = {file for rows in report.ours.values() for row in rows for file in row.files}
    return (
        f"{len(files)} results in the paper's tables, {len(report.others)} on other data or by other "
        f"protocols, {len(report.refused)} files left out. Empty cells of ours have not been measured; those "
        "of others are not in the sources named."
    )


def _text(table: PaperTable) -> str:
    """What all rows of a table have in common."""
    used = dict.fromkeys(column.protocol for column in table.columns)
    data = [
        f"{PUBLISHED[name].data} by {name} ({PUBLISHED[name].test:,} test images, "
        f"{PUBLISHED[name].classes:,} classes)"
        for name in used
    ]
    return (
        f"In percent. {'; '.join(data)}. The published rows are of ResNet-50, pretrained on ImageNet without "
        "labels but for the supervised one."
    )


def _lines(table: PaperTable, report: Report) -> list[tuple[str, ...]]:
    headings = [column.heading for column in table.columns]

    def cells(percentages: Mapping[str, float]) -> list[str]:
        return [f"{percentages[heading]:.1f}" if heading in percentages else "" for heading in headings]

    lines = [("", *headings, "from", "differs from the published protocol")]
    lines += [(row.method, *cells(row.percentages), row.source, "") for row in table.rows]
    for row in report.ours[table.number]:
        lines.append(
            (f"ours: {row.checkpoint}", *cells(row.percentages), ", ".join(row.files), "; ".join(row.notes))
        )
    if not report.ours[table.number]:
        lines.append(("ours", *cells({}), "not run", ""))
    return lines


def _other_lines(report: Report) -> list[tuple[str, ...]]:
    lines = [("checkpoint", "protocol", "figures, in percent", "tested on", "from", "why here")]
    for result, reason in ((row.result, row.reason) for row in report.others):
        figures = ", ".join(f"{name} {100 * value:.1f}" for name, value in result.record["figures"].items())
        test = result.record["data"]["test"]
        tested = f"{test.get('path', '')}: {test['images']:,} images, {test['classes']:,} classes"
        lines.append((result.checkpoint, result.protocol, figures, tested, result.file, reason))
    return lines


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    rule = "|" + "---|" * len(lines[0])
    return "\n".join([header, rule, *rows])
