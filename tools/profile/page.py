"""A profile as one page to look at: verdict first, then what it rests on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.figures import phases_png
from tools.figures_profile import ceilings_png, ranks_png, roofline_png, shares_png, timeline_png
from tools.profile.result import headline, unwritable
from tools.profile.summary import summary_tables
from tools.report import Picture, Section, render_report, settings_section

PAGE_NAME = "report.html"


def write_page(profile: Mapping[str, Any], out: Path) -> None:
    """Write `report.html`, which loads nothing, into `out`. Raises `TrainingError` where that fails."""
    page = render_report("Where the time goes", profile["verdict"]["sentence"], list(_sections(profile)))
    try:
        (out / PAGE_NAME).write_text(page, encoding="utf-8")
    except OSError as error:
        raise unwritable(out, error) from error


def _sections(profile: Mapping[str, Any]) -> Iterator[Section]:
    settings, run = profile["settings"], profile["run"]
    ceilings, split, *of_ranks = summary_tables(profile)
    yield Section(
        "What each part could do alone",
        "Pairs of views per second. The run can be no faster than its slowest part; parts that share the "
        "processor's cores slow each other down, so the run may well be slower than each of them.",
        [
            Picture(
                ceilings_png(
                    {name: part["pairs_per_second"] for name, part in profile["ceilings"].items()},
                    run["pairs_per_second"] / settings["ranks"],
                ),
                "Each part's pairs per second as a bar, with a line at the run's own",
            )
        ],
        table=ceilings[1],
    )
    yield Section(
        "The split of a step",
        "Measured without waiting for the device. Data wait is how long the step stood still for want of a "
        "batch; exposed communication what it waited for other ranks beyond its own work.",
        [Picture(phases_png(run["phases"], headline(profile)), "The phases of a step as parts of a bar")],
        table=split[1],
    )
    if of_ranks:
        yield Section(
            "The ranks",
            "All ranks end a step together, so the slowest one waits least for the others.",
            [Picture(ranks_png(profile["ranks"]), "A bar for each rank, of its own time and its waiting")],
            table=of_ranks[0][1],
        )
        yield Section("Communication", "Each collective of a step, measured alone.", table=of_ranks[1][1])
    if profile.get("kernels"):
        yield _kernels(profile["kernels"], profile["peaks"])
    if profile.get("utilisation"):
        yield _utilisation(profile["utilisation"])
    yield settings_section({name: str(value) for name, value in (settings | profile["environment"]).items()})


def _kernels(kernels: Mapping[str, Any], peaks: Mapping[str, Any]) -> Section:
    rows = [("kind, operation", "ms per step", "calls", "TFLOP/s", "GB/s")]
    rows += [
        (
            f"{row['kind']}: {row['name']}",
            f"{1000 * row['seconds']:.3g}",
            f"{row['calls']:g}",
            _per_second(row["flop"], row["seconds"], 1e12),
            _per_second(row["bytes"], row["seconds"], 1e9),
        )
        for row in kernels["rows"]
    ]
    use = [
        f"{kernels[key]:.0%} of the {what} that this device was measured to reach"
        for key, what in (("mfu", "products"), ("bandwidth_share", "memory bandwidth"))
        if kernels.get(key) is not None
    ]
    cover = kernels.get("bytes_cover")
    known = "" if cover is None else f" Bytes are known, and counted, for {cover:.0%} of the kernel time."
    trace = (
        f" The steps themselves are in {kernels['trace']}, for ui.perfetto.dev." if kernels["trace"] else ""
    )
    return Section(
        "What the time is spent on",
        f"Shares of kernel time by kind of work{'; a step uses ' if use else ''}{' and '.join(use)}. "
        f"Measured peaks: {peaks['flops'] / 1e12:.3g} TFLOP/s in {peaks['precision']}, "
        f"{peaks['bytes_per_second'] / 1e9:.3g} GB/s.{known}{trace}",
        [
            Picture(shares_png(kernels["shares"]), "Each kind's share of kernel time as a bar"),
            Picture(
                roofline_png(_by_kind(kernels["rows"]), peaks),
                "Operations per byte against operations per second, under the two measured roofs",
            ),
        ],
        table=rows,
    )


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}


def _utilisation(utilisation: Mapping[str, Any]) -> Section:
    rows: list[tuple[str, str]] = [("figure, mean over the run", "")]
    if utilisation["gpu"]:
        rows += [(name.replace("_", " "), _figure(name, value)) for name, value in utilisation["gpu"].items()]
    cpu = utilisation["cpu"]
    rows.append(("each core in use", ", ".join(f"{share:.0%}" for share in cpu["per_core"])))
    rows.append(("busiest thread of the process", f"{cpu['busiest_thread']:.0%}"))
    pictures = []
    if utilisation.get("timeline"):
        pictures = [Picture(timeline_png(utilisation["timeline"]), "Use of the machine over the run's time")]
    warnings = " ".join(utilisation["warnings"])
    return Section(
        "How busy the machine was",
        f"Sampled {utilisation['samples']} times while the run went on ({utilisation['source']}). {warnings}",
        pictures,
        table=rows,
    )


def _figure(name: str, value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.3g} GiB"
    return f"{value:.0f}" if name.endswith(("_watts", "_mhz")) else f"{value:.0%}"


def _per_second(amount: float | None, seconds: float, unit: float) -> str:
    return "" if not amount or not seconds else f"{amount / seconds / unit:.3g}"
