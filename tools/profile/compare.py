"""Two profiles side by side: what changed, and whether it is more than the runs' own spread."""

from collections.abc import Mapping
from typing import Any

from train.errors import TrainingError

Table = tuple[str, list[tuple[str, ...]]]
PARTS = "settings", "environment", "ceilings", "run", "verdict"


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What changed from the profile `before` to `after`, as plain data.

    - `speed`: pairs/s of both and the ratio; `is_beyond_spread` says whether the middle 80 % of the steps'
      times of one lie wholly beside those of the other
    - `phases` and `ceilings`: by name the figures of both (seconds; pairs/s), None where one has no such part
    - `kernels`: by kind the share of kernel time
    - `changed`: settings and versions that differ
    - `verdicts`: both sentences

    Raises `TrainingError` where one of them is no profile.
    """
    for name, profile in (("first", before), ("second", after)):
        missing = [part for part in PARTS if not isinstance(profile.get(part), Mapping)]
        if missing:
            raise TrainingError(
                f"The {name} file is not a profile, as it lacks {missing[0]!r}; give a profile.json that "
                "fastbarlow profile wrote."
            )
    runs = before["run"], after["run"]
    rates = [run["pairs_per_second"] for run in runs]
    spreads = [run["step_seconds_percentiles"] for run in runs]
    apart = spreads[0]["p90"] < spreads[1]["p10"] or spreads[1]["p90"] < spreads[0]["p10"]
    same_batch = before["settings"]["batch_size"] == after["settings"]["batch_size"]
    return {
        "speed": {
            "before": rates[0],
            "after": rates[1],
            "ratio": rates[1] / rates[0],
            # Steps of unequal batches take unequal times anyhow.
            "is_beyond_spread": apart if same_batch else None,
        },
        "phases": _both(runs[0]["phases"], runs[1]["phases"]),
        "ceilings": _both(
            *({n: c["pairs_per_second"] for n, c in p["ceilings"].items()} for p in (before, after))
        ),
        "kernels": _both(*((p.get("kernels") or {}).get("shares", {}) for p in (before, after))),
        "changed": {
            name: pair
            for part in ("settings", "environment")
            for name, pair in _both(before[part], after[part]).items()
            if pair[0] != pair[1]
        },
        "verdicts": [before["verdict"]["sentence"], after["verdict"]["sentence"]],
    }


def comparison_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """For the terminal; parts that neither profile has are left out."""
    head = ("", "before", "after", "change")
    speed = comparison["speed"]
    rows = [
        head,
        ("the run", f"{speed['before']:,.1f}", f"{speed['after']:,.1f}", f"{speed['ratio'] - 1:+.1%}"),
    ]
    for name, (a, b) in comparison["ceilings"].items():
        rows.append((f"{name} alone", _cell(a, ",.1f"), _cell(b, ",.1f"), _change(a, b)))
    tables: list[Table] = [("Pairs/s", rows)]
    rows = [head]
    for name, (a, b) in comparison["phases"].items():
        rows.append((name, _cell(a, ".2f", 1000), _cell(b, ".2f", 1000), _change(a, b)))
    tables.append(("Phases of a step, ms", rows))
    if comparison["kernels"]:
        rows = [head[:3]]
        rows += [(name, _cell(a, ".1%"), _cell(b, ".1%")) for name, (a, b) in comparison["kernels"].items()]
        tables.append(("Shares of kernel time", rows))
    if comparison["changed"]:
        rows = [head[:3]]
        rows += [
            (name, *("-" if v is None else str(v) for v in p)) for name, p in comparison["changed"].items()
        ]
        tables.append(("Settings and versions that differ", rows))
    return tables


def comparison_sentence(comparison: Mapping[str, Any]) -> str:
    """How the speed changed, and whether to believe it."""
    speed = comparison["speed"]
    rates = f"{speed['before']:,.1f} to {speed['after']:,.1f} pairs/s"
    sentence = f"The run went from {rates} ({speed['ratio']:.2f} times)"
    if speed["is_beyond_spread"] is None:
        return f"{sentence}; the steps have batches of different sizes, so their spread is not compared."
    if speed["is_beyond_spread"]:
        return f"{sentence}, which is more than the spread of its steps."
    return f"{sentence}, which is within the spread of its steps: measure more of them before you believe it."


def _both(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (before.get(name), after.get(name)) for name in before | after}


def _cell(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else format(factor * value, form)


def _change(before: float | None, after: float | None) -> str:
    return "-" if not before or after is None else f"{after / before - 1:+.1%}"
