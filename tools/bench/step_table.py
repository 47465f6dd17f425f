"""The result of `fastbarlow bench step` as tables for people."""

from typing import Any

from tools.console import or_dash

Table = tuple[str, list[list[str]]]  # title, rows; the first row is the header

LEGEND = """\
All took turns on random pixels that lie ready on the device; figures are medians.
The authors' step gets views that are distorted already, since their loader does that on the CPU, in worker
processes; "ours, views given" is ours without distortions. On GPUs theirs computes in fp16 with a gradient
scaler, as their code does, where ours is in half precision; elsewhere in our precision.
FLOP: the network's, of one forward and backward pass, and those of the loss as each has it."""
LEGEND_CPU = "Memory: what the process holds on top of its libraries, counted in a process of its own."
LEGEND_LIVE = '"of synthetic": pairs/s with the loader at work over those of "ours" on ready batches.'


def step_legend(result: dict[str, Any]) -> str:
    """What one must know to read the tables."""
    lines = [LEGEND]
    if result["environment"]["device"] == "CPU":
        lines.append(LEGEND_CPU)
    if any(row["share_of_synthetic"] is not None for row in result["rows"]):
        lines.append(LEGEND_LIVE)
    return "\n".join(lines)


def step_tables(result: dict[str, Any]) -> list[Table]:
    """For each batch size the speed of all steps, then their phases."""
    batches = dict.fromkeys(row["batch_size"] for row in result["rows"])
    tables = []
    for N in batches:
        rows = [row for row in result["rows"] if row["batch_size"] == N]
        tables += [_speeds(result, rows), _phases(rows)]
    return tables


def _speeds(result: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    has_live = any(row["share_of_synthetic"] is not None for row in rows)
    header = ["step", "pairs/s", "ms", "x authors'", "TFLOP/s", "MFU", "GB"]
    table = [header + ["of synthetic"] * has_live]
    for row in rows:
        cells = [
            row["name"],
            _rate(row["pairs_per_second"]),
            _ms(row["ms_per_step"]),
            or_dash(row["speedup"], ".2f"),
            f"{row['tflops']:.3g}",
            or_dash(row["mfu"], ".1%"),
            "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.3g}",
        ]
        table.append(cells + [or_dash(row["share_of_synthetic"], ".1%")] * has_live)
    what = result["settings"]
    title = [what["backbone"], what["projector"], f"{what['image_size']} px", what["precision"]]
    title += [f"batch {rows[0]['batch_size']}", f"norm {what['norm']}"]
    title += [name for name in ("compile", "cuda_graph") if what[name]]
    return ", ".join([*title, f"median of {result['repeats']}"]), table


def _phases(rows: list[dict[str, Any]]) -> Table:
    phases = list(dict.fromkeys(phase for row in rows for phase in row["phases_ms"]))
    table = [["ms", *phases]]
    for row in rows:
        spent = row["phases_ms"]
        table.append([row["name"], *(_ms(spent[phase]) if phase in spent else "-" for phase in phases)])
    return f"Phases of a step of {rows[0]['batch_size']} pairs", table


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
