"""What limits a run, by how much, and the setting to change: a pure function of what a profile has measured.

The rates here are pairs of views per second of one rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tools.profile import advice
from tools.profile.ranks import FEEDING, find_straggler
from tools.profile.result import COPY, DATA_WAIT, EXPOSED

# Shares of a step from which on a cause is named; they are tried in this order.
STRAGGLER_SHARE = 0.15  # by which the slowest rank is slower than the others
WAIT_SHARE = 0.1  # waiting for data, from a loader that is slower than the step
SHARING_SHARE = 0.3  # waiting for data, from one that is fast enough alone
EXPOSED_SHARE = 0.2  # waiting for collectives, on the rank that waits least
AUGMENT_SHARE = 0.5  # distortions, of a step that nothing else holds up
# A loader that is slower than that share of what its stages could do together is itself the limit.
LOADER_SHARE = 0.5
ON_THREADS = "read", "decode", "crop"  # the stages that follow each other on the loader's threads
_VERBS = {"read": "Reading", "decode": "Decoding", "crop": "Cropping"}


class Verdict(NamedTuple):
    limit: str  # read, decode, crop, augment, copy, loader, step, collectives or straggler
    sentence: str
    change: str | None  # the first setting to change, such as data.workers=5; None where none would help
    ratio: float  # how many times as fast the run could be without this limit


def judge(profile: Mapping[str, Any]) -> Verdict:
    """The limit of a profile with at least `settings`, `ceilings` of loader and step, and `run`.

    1. A rank that is slower by itself than the others, which wait for it.
    2. Waiting for data: the copy to the GPU, or of the loader's stages the slowest, or the loader as a whole.
    3. Waiting for collectives.
    4. Else the step.
    """
    run = profile["run"]
    straggler = find_straggler(profile.get("ranks") or [])
    if straggler and straggler["excess_seconds"] > STRAGGLER_SHARE * run["step_seconds"]:  # 1
        return _straggler(profile, straggler)
    phases = _least_hindered(profile)
    share = {phase: seconds / run["step_seconds"] for phase, seconds in phases.items()}
    loader, step = (profile["ceilings"][name]["pairs_per_second"] for name in ("loader", "step"))
    if share.get(COPY, 0.0) > max(WAIT_SHARE, share[DATA_WAIT]):  # 2
        return _copy(profile)
    if share[DATA_WAIT] > (WAIT_SHARE if loader < step else SHARING_SHARE):
        return _feeding(profile)
    if share.get(EXPOSED, 0.0) > EXPOSED_SHARE:  # 3
        return _collectives(profile, phases[EXPOSED])
    return _step(profile, phases)  # 4


def _least_hindered(profile: Mapping[str, Any]) -> Mapping[str, float]:
    """The phases of the rank that waits least for others: there the waiting is communication itself."""
    ranks: Sequence[Mapping[str, Any]] = profile.get("ranks") or [profile["run"]]
    return min(ranks, key=lambda rank: rank["phases"].get(EXPOSED, 0.0))["phases"]


def _straggler(profile: Mapping[str, Any], straggler: Mapping[str, Any]) -> Verdict:
    step = profile["run"]["step_seconds"]
    ratio = step / (step - straggler["excess_seconds"])
    if straggler["cause"] == "loader":
        cause = "its own loader keeps it waiting"
        change = "look at the storage and the free cores of that machine, or raise data.workers there"
    else:
        cause = f"its own compute, most of it in the phase {straggler['phase']}"
        change = "look for other processes, a lower clock or a hot device there, or leave that machine out"
    return Verdict(
        "straggler",
        f"Rank {straggler['rank']} on {straggler['host']} holds up all others: its own part of a step is "
        f"{advice.number(1000 * straggler['excess_seconds'])} ms ({straggler['slower']:.0%}) longer, and the "
        f"likely cause is {cause}; {change}: the run could be {ratio:.2f} times as fast.",
        change,
        ratio,
    )


def _feeding(profile: Mapping[str, Any]) -> Verdict:
    settings, ceilings = profile["settings"], profile["ceilings"]
    loader, step = ceilings["loader"]["pairs_per_second"], ceilings["step"]["pairs_per_second"]
    stages = {name: ceilings[name]["pairs_per_second"] for name in ON_THREADS if name in ceilings}
    if settings["loader"] == "dali" and settings["device"] == "cuda":
        stages.pop("decode", None), stages.pop("crop", None)  # not as DALI does it on a GPU
    limit = "loader"
    if stages and loader > LOADER_SHARE / sum(1 / rate for rate in stages.values()):
        limit = min(stages, key=stages.get)
    ratio = max(1.0, step / _rate(profile))
    if loader >= step:
        return _sharing(profile, ratio)
    workers = advice.plural(max(1, settings["workers"]), "worker")
    what = (
        f"The loader {settings['loader']} limits: with {workers} it delivers {advice.number(loader)} pairs/s"
    )
    if limit != "loader":
        what = (
            f"{_VERBS[limit]} limits: with {workers} it gives {advice.number(stages[limit])} pairs/s alone, "
            f"the whole loader {advice.number(loader)}"
        )
    changes = advice.for_loading(profile, limit)
    sentence = f"{what}; the step could take {advice.number(step)}: {advice.join(changes)}."
    return Verdict(limit, sentence, advice.first(changes[0]), ratio)


def _sharing(profile: Mapping[str, Any], ratio: float) -> Verdict:
    """Each is fast enough alone, but together the step waits."""
    settings, ceilings = profile["settings"], profile["ceilings"]
    loader, step = (advice.number(ceilings[name]["pairs_per_second"]) for name in ("loader", "step"))
    if settings["device"] == "cpu":
        cores = advice.plural(settings["cores"], "core")
        why, change = f"they share {cores}", "more cores"
    else:
        why, change = "it comes unevenly", f"data.prefetch={min(16, 2 * settings['prefetch'])}"
    return Verdict(
        "loader",
        f"The loader limits although alone it delivers {loader} pairs/s and the step alone takes {step}, "
        f"since {why}: {'this needs' if settings['device'] == 'cpu' else 'set'} {change}.",
        change,
        ratio,
    )


def _copy(profile: Mapping[str, Any]) -> Verdict:
    copy, step = (profile["ceilings"].get(name, {}).get("pairs_per_second") for name in ("copy", "step"))
    alone = "" if copy is None else f" (alone it does {advice.number(copy)} pairs/s)"
    if profile["settings"]["loader"] == "dali":
        what, change = "Copying and decoding on the GPU limit", "data.dali.device=cpu"
    else:
        what, change = f"Copying to the GPU limits{alone}", "data.loader=dali"
    return Verdict(
        "copy",
        f"{what}; the step could take {advice.number(step)} pairs/s: set {change}, or see that the GPU "
        f"has all its PCIe lanes.",
        change,
        max(1.0, step / _rate(profile)),
    )


def _collectives(profile: Mapping[str, Any], exposed: float) -> Verdict:
    step, rows = profile["run"]["step_seconds"], profile.get("collectives") or []
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[row["what"]] = seconds.get(row["what"], 0.0) + row["count"] * row["seconds"]
    dearest = max(seconds, key=seconds.get, default=None)
    most = (
        ""
        if dearest is None
        else f", most of it for the {dearest} ({advice.number(1000 * seconds[dearest])} ms alone)"
    )
    waited, whole = advice.number(1000 * exposed), advice.number(1000 * step)
    change = advice.for_collectives(profile["settings"], dearest)
    ratio = step / (step - exposed)
    return Verdict(
        "collectives",
        f"Communication limits: {waited} of {whole} ms of a step are waiting for collectives{most}; "
        f"without, the run could be {ratio:.2f} times as fast: {change}.",
        advice.first(change),
        ratio,
    )


def _step(profile: Mapping[str, Any], phases: Mapping[str, float]) -> Verdict:
    ceilings, run = profile["ceilings"], profile["run"]
    loader, step = ceilings["loader"]["pairs_per_second"], ceilings["step"]["pairs_per_second"]
    own = {phase: s for phase, s in phases.items() if phase not in (*FEEDING, EXPOSED, "idle")}
    longest = max(own, key=own.get)
    share = own[longest] / run["step_seconds"]
    limit = "augment" if longest == "augment" and share > AUGMENT_SHARE else "step"
    change = advice.for_step(profile, limit)
    what = "Distorting the views limits" if limit == "augment" else "The step limits"
    most = f"most of it is {longest}, {share:.0%}"
    spare = f"the loader could deliver {advice.number(loader)}"
    if loader < step:
        spare = f"the loader alone delivers {advice.number(loader)}, but not beside the step"
    return Verdict(
        limit,
        f"{what}: alone it takes {advice.number(step)} pairs/s ({most}), and {spare}: "
        f"{change or 'nothing but faster or more devices would help'}.",
        change and advice.first(change),
        max(1.0, loader / _rate(profile)),
    )


def _rate(profile: Mapping[str, Any]) -> float:
    return profile["run"]["pairs_per_second"] / profile["settings"]["ranks"]
