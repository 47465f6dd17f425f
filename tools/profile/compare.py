"""Two profiles side by side: what changed, and whether it is more than the runs' own spread."""

from collections.abc import Mapping
from typing import Any

from train.errors import TrainingError

Table = tuple[str, list[tuple[str, ...]]]


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What changed from the profile `before` to `after`, as plain data.

    - `speed`: pairs/s of both and the ratio; `is_beyond_spread` says whether the middle 80 % of the steps'
      times of one lie wholly beside those of the other
    - `phases` and `ceilings`: by name the figures of both (seconds; pairs/s), None where one has no such part
    - `kernels`: by kind the share of kernel time
    - `use`: how much of the device and of the cores was in use; shares
    - `changed`: settings and versions that differ
    - `verdicts`: both sentences

    Raises `TrainingError` where one of them is no profile.
    """
    first, second = _compared("first", before), _compared("second", after)
    is_apart = first["p90"] < second["p10"] or second["p90"] < first["p10"]
    return {
        "speed": {
            "before": first["rate"],
            "after": second["rate"],
            "ratio": second["rate"] / first["rate"],
            # Steps of unequal batches take unequal times anyhow.
            "is_beyond_spread": is_apart if first["batch_size"] == second["batch_size"] else None,
        },
        **{part: _both(first[part], second[part]) for part in ("phases", "ceilings", "kernels", "use")},
        "changed": {
            name: pair for name, pair in _both(first["set"], second["set"]).items() if pair[0] != pair[1]
        },
        "verdicts": [first["verdict"], second["verdict"]],
    }


def _compared(which: str, profile: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a profile that are compared."""
    advice = "give a profile.json that fastbarlow profile wrote."
    try:
        run, kernels = profile["run"], profile.get("kernels") or {}
        spread = run["step_seconds_percentiles"]
        return {
            "rate": _positive(run["pairs_per_second"]),
            "p10": _positive(spread["p10"]),
            "p90": _positive(spread["p90"]),
            "batch_size": profile["settings"]["batch_size"],
            "phases": {name: float(seconds) for name, seconds in run["phases"].items()},
            "ceilings": {name: float(part["pairs_per_second"]) for name, part in profile["ceilings"].items()},
            "kernels": dict(kernels.get("shares") or {}),
            "use": _use(kernels, profile.get("utilisation") or {}),
            "set": {**profile["settings"], **profile["environment"]},
            "verdict": profile["verdict"]["sentence"],
        }
    except KeyError as error:
        raise TrainingError(f"The {which} file is not a profile, as it lacks {error}; {advice}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise TrainingError(f"The {which} file is not a whole profile; {advice}") from error


def _positive(value: Any) -> float:
    if not float(value) > 0:
        raise ValueError(value)
    return float(value)


def _use(kernels: Mapping[str, Any], utilisation: Mapping[str, Any]) -> dict[str, float]:
    cpu, gpu = (utilisation.get(part) or {} for part in ("cpu", "gpu"))
    figures = {
        "products of the measured peak": kernels.get("mfu"),
        "memory bandwidth of the measured peak": kernels.get("bandwidth_share"),
        "some kernel ran": gpu.get("kernel_ran"),
        "multiprocessors at work": gpu.get("sm_active"),
        "tensor cores at work": gpu.get("tensor_active"),
        "GPU memory at work": gpu.get("dram_active"),
        "slowed down by power or heat": gpu.get("throttled"),
        "cores": cpu.get("mean"),
        "the busiest thread": cpu.get("busiest_thread"),
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


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
    for part, title in (("kernels", "Shares of kernel time"), ("use", "In use, mean over the run")):
        rows = [(name, _cell(a, ".1%"), _cell(b, ".1%")) for name, (a, b) in comparison[part].items()]
        if rows:
            tables.append((title, [head[:3], *rows]))
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
    return {name: (before.get(name), after.get(name)) for name in {**before, **after}}


def _cell(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else format(factor * value, form)


def _change(before: float | None, after: float | None) -> str:
    return "-" if not before or after is None else f"{after / before - 1:+.1%}"
