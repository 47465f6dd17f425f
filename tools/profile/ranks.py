"""The ranks of a profile side by side: who makes the others wait, and by what."""

import socket
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tools.profile.result import COPY, DATA_WAIT, EXPOSED, IDLE
from tools.profile.split import Split
from train.distributed import World

FEEDING = DATA_WAIT, COPY
_NOT_BUSY = {DATA_WAIT, COPY, EXPOSED, IDLE}


def gather_ranks(world: World, split: Split, loader_pairs_per_second: float) -> list[dict[str, Any]]:
    """Each rank's own figures, in rank order, on every rank."""
    return world.gather(
        {
            "rank": world.rank,
            "host": socket.gethostname(),
            "step_seconds": split.step_seconds,
            "phases": split.phases,
            "busy_seconds": sum(s for phase, s in split.phases.items() if phase not in _NOT_BUSY),
            "loader_pairs_per_second": loader_pairs_per_second,
        }
    )


def own_seconds(rank: Mapping[str, Any]) -> float:
    """A step without the waiting for other ranks: all that is this rank's own, its data included."""
    return rank["step_seconds"] - rank["phases"].get(EXPOSED, 0.0)


def find_straggler(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The rank that has most to do by itself, against the median of the others; None for a single rank.

    All ranks finish a step together: the others wait in collectives for the slowest one, which waits least.
    `excess_seconds` is what it takes longer, `slower` the same as a share of the others' time, `cause`
    "loader" where most of it is waiting for data, else "compute", and `phase` where most of it is spent.
    """
    if len(ranks) < 2:
        return None
    slowest = max(ranks, key=own_seconds)
    others = [rank for rank in ranks if rank is not slowest]
    usual = median(own_seconds(rank) for rank in others)
    excess = own_seconds(slowest) - usual
    by_phase = {
        phase: seconds - median(other["phases"].get(phase, 0.0) for other in others)
        for phase, seconds in slowest["phases"].items()
        if phase != EXPOSED
    }
    feeding = sum(by_phase.get(phase, 0.0) for phase in FEEDING)
    return {
        "rank": slowest["rank"],
        "host": slowest["host"],
        "excess_seconds": excess,
        "slower": excess / usual,
        "cause": "loader" if feeding > excess / 2 else "compute",
        "phase": max(by_phase, key=by_phase.get),
    }
