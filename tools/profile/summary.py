"""A profile as tables for the terminal: each a title and rows, the first of them the header."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.profile.advice import plural
from tools.profile.ranks import own_seconds
from tools.profile.result import EXPOSED, headline, shares

Table = tuple[str, list[Sequence[str]]]
_ON_THREADS = "read", "decode", "crop"


def summary_tables(profile: Mapping[str, Any]) -> Iterator[Table]:
    """Ceilings, split and, where there are several ranks, these and their collectives."""
    yield _ceilings(profile)
    yield _split(profile)
    if len(profile["ranks"]) > 1:
        yield _ranks(profile["ranks"])
        yield _collectives(profile["collectives"])


def _ceilings(profile: Mapping[str, Any]) -> Table:
    settings = profile["settings"]
    rows: list[Sequence[str]] = [("part, alone", "pairs/s", "cores", "GB/s")]
    for name, ceiling in profile["ceilings"].items():
        if name in _ON_THREADS:
            name += f", {plural(ceiling.get('threads', max(1, settings['workers'])), 'thread')}"
        if ceiling.get("cold") is False:
            name += " (from memory)"
        bytes_per_second = ceiling.get("bytes_per_second")
        rows.append(
            (
                name,
                f"{ceiling['pairs_per_second']:,.1f}",
                f"{ceiling['cores_used']:.1f}",
                "" if bytes_per_second is None else f"{bytes_per_second / 1e9:.3g}",
            )
        )
    ranks = settings["ranks"]
    rows.append(("the run itself", f"{profile['run']['pairs_per_second'] / ranks:,.1f}", "", ""))
    return "What each part could do" + (f", for each of {ranks} ranks" if ranks > 1 else ""), rows


def _split(profile: Mapping[str, Any]) -> Table:
    run = profile["run"]
    rows: list[Sequence[str]] = [("phase", "ms per step", "share")]
    of_step = shares(run["phases"])
    rows += [(name, f"{1000 * s:.2f}", f"{of_step[name]:.1%}") for name, s in run["phases"].items()]
    rows.append(("step", f"{1000 * run['step_seconds']:.2f}", "100.0%"))
    percentiles = run["step_seconds_percentiles"]
    rows += [(f"step, {name}", f"{1000 * s:.2f}", "") for name, s in percentiles.items()]
    where = " on rank 0" if profile["settings"]["ranks"] > 1 else ""
    return f"{headline(profile)}; mean of {profile['steps']}{where}", rows


def _ranks(ranks: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[Sequence[str]] = [("rank, host", "own ms", "busy ms", "data wait ms", "waits for others ms")]
    for rank in ranks:
        phases = rank["phases"]
        seconds = own_seconds(rank), rank["busy_seconds"], phases["data wait"], phases.get(EXPOSED, 0.0)
        rows.append((f"{rank['rank']}, {rank['host']}", *(f"{1000 * s:.2f}" for s in seconds)))
    return "The ranks: the slowest is the one with most of its own", rows


def _collectives(collectives: Sequence[Mapping[str, Any]]) -> Table:
    """Those for one purpose in a row: a network has a pair for each layer."""
    rows: list[Sequence[str]] = [("collective, alone", "per step", "MB per step", "ms per step", "GB/s")]
    for operation, what in dict.fromkeys((row["operation"], row["what"]) for row in collectives):
        alike = [row for row in collectives if (row["operation"], row["what"]) == (operation, what)]
        count = sum(row["count"] for row in alike)
        num_bytes = sum(row["count"] * row["bytes"] for row in alike)
        seconds = sum(row["count"] * row["seconds"] for row in alike)
        rows.append(
            (
                f"{operation} of {what}",
                f"{count:.0f}",
                f"{num_bytes / 1e6:.3g}",
                f"{1000 * seconds:.2f}",
                f"{num_bytes / seconds / 1e9:.3g}",
            )
        )
    return "Communication", rows
