"""The verdict names what limits, by how much, and only what can be done on that machine: tables of cases."""

import pytest

from tools.profile.ranks import find_straggler
from tools.profile.summary import summary_tables
from tools.profile.verdict import judge

SETTINGS = {
    "image_size": 224,
    "batch_size": 256,
    "micro_batches": 1,
    "precision": "bf16",
    "norm": "twin",
    "sync_bn": "all",
    "compile": False,
    "cuda_graph": False,
    "loader": "ffcv",
    "data_path": "train.beton",
    "workers": 2,
    "prefetch": 3,
    "augment": "auto",
    "loss": "auto",
    "device": "cuda",
    "has_bf16": True,
    "ranks": 1,
    "ranks_per_host": 1,
    "cores": 8,
}
# Milliseconds of a step that takes 256 pairs.
STEP_BOUND = {
    "data wait": 1,
    "copy": 1,
    "augment": 8,
    "forward": 40,
    "loss": 5,
    "backward": 75,
    "optimizer": 5,
}
LOADER_BOUND = STEP_BOUND | {"data wait": 200}


def profile(
    phases: dict, loader_rate: float, step_rate: float, stages: dict | None = None, **settings: object
) -> dict:
    """Of one rank, or of as many as settings say, all alike; `phases` in milliseconds."""
    chosen = SETTINGS | settings
    seconds = {phase: ms / 1000 for phase, ms in phases.items()}
    total = sum(seconds.values())
    ranks = [
        {
            "rank": rank,
            "host": "node-a",
            "step_seconds": total,
            "phases": dict(seconds),
            "busy_seconds": total,
            "loader_pairs_per_second": loader_rate,
        }
        for rank in range(chosen["ranks"])
    ]
    rates = {"read": 50_000.0, "decode": 900.0, "crop": 4000.0} | (stages or {})
    ceilings = {name: {"pairs_per_second": rate, "cores_used": 1.0} for name, rate in rates.items()}
    ceilings["loader"] = {"pairs_per_second": loader_rate, "cores_used": 1.0}
    ceilings["step"] = {"pairs_per_second": step_rate, "cores_used": 1.0, "host_lead_seconds": 0.05}
    percentiles = {"p10": total, "p50": total, "p90": total}
    run = {
        "pairs_per_second": chosen["batch_size"] / total,
        "step_seconds": total,
        "step_seconds_percentiles": percentiles,
        "phases": seconds,
    }
    return {
        "steps": 5,
        "settings": chosen,
        "dataset": {"mean_longer_side": 500.0},
        "ceilings": ceilings,
        "collectives": [],
        "run": run,
        "ranks": ranks,
    }


CASES = {
    # phases, loader, step, stages, settings: limit, change, words of the sentence, words it must not have
    "decoding, with free cores": (
        (LOADER_BOUND, 740, 1900, {}, {}),
        (
            "decode",
            "data.workers=6",
            ["900", "740", "1,900", "4 more cores", "--max-side 340", "loader=dali"],
            [],
        ),
    ),
    "decoding, all cores in use": (
        (LOADER_BOUND, 740, 1900, {}, {"workers": 8}),
        ("decode", "convert with --max-side 340", ["13 more cores"], ["data.workers="]),
    ),
    "decoding, some cores, too few": (
        (LOADER_BOUND, 740, 19_000, {}, {"workers": 4}),
        ("decode", "data.workers=8", ["all of this machine's cores", "1,480"], ["more core"]),
    ),
    "decoding, cores shared by ranks": (
        (LOADER_BOUND, 740, 1900, {}, {"ranks": 4, "ranks_per_host": 4}),
        ("decode", "convert with --max-side 340", ["4 more cores for each rank"], ["data.workers="]),
    ),
    "decoding on the CPU of small images": (
        (LOADER_BOUND, 740, 1900, {}, {"device": "cpu", "image_size": 400}),
        ("decode", "data.workers=6", [], ["dali", "--max-side"]),
    ),
    "decoding, DALI on the CPU": (
        (LOADER_BOUND, 740, 1900, {}, {"device": "cpu", "loader": "dali"}),
        ("decode", "data.workers=6", [], ["data.loader"]),
    ),
    "cropping": (
        (LOADER_BOUND, 300, 1900, {"crop": 400.0}, {}),
        ("crop", "data.workers=8", ["Cropping limits", "400"], ["--max-side"]),
    ),
    "a slow disk": (
        (LOADER_BOUND, 90, 1900, {"read": 100.0}, {"workers": 8}),
        ("read", "convert with --max-side 340", ["Reading limits", "faster disk"], ["more core", "workers="]),
    ),
    "the slow loader on a folder": (
        (LOADER_BOUND, 100, 1900, {}, {"loader": "folder", "data_path": "images"}),
        ("loader", "convert to a .beton file and data.loader=ffcv", ["The loader folder limits", "100"], []),
    ),
    "the slow loader on a .beton file": (
        (LOADER_BOUND, 100, 1900, {}, {"loader": "folder"}),
        ("loader", "data.loader=ffcv", ["data.workers=8"], []),
    ),
    "DALI on a GPU": (
        (LOADER_BOUND, 740, 1900, {}, {"loader": "dali"}),
        ("loader", "data.workers=6", ["loader dali limits"], ["ecod"]),
    ),
    "a loader without stages": (
        (LOADER_BOUND, 740, 1900, {"read": 1e9, "decode": 1e9, "crop": 1e9}, {"workers": 8}),
        ("loader", "a machine with 13 more cores: the 8 here are in use", ["740"], []),
    ),
    "cores shared by loader and step": (
        (LOADER_BOUND, 2000, 1900, {}, {"device": "cpu"}),
        ("loader", "more cores", ["they share 8 cores", "2,000", "1,900"], []),
    ),
    "uneven batches": (
        (LOADER_BOUND, 2000, 1900, {}, {}),
        ("loader", "data.prefetch=6", ["unevenly"], []),
    ),
    "the copy": (
        (STEP_BOUND | {"copy": 90}, 4000, 1900, {"copy": 1500.0}, {}),
        ("copy", "data.loader=dali", ["1,500", "1,900"], []),
    ),
    "the step": (
        (STEP_BOUND, 4000, 1900, {}, {}),
        ("step", None, ["1,900", "4,000", "most of it is backward, 56%", "faster or more devices"], []),
    ),
    "the step in fp32": (
        (STEP_BOUND, 4000, 1900, {}, {"precision": "fp32"}),
        ("step", "train.precision=bf16", [], []),
    ),
    "the step in fp32, no bf16": (
        (STEP_BOUND, 4000, 1900, {}, {"precision": "fp32", "has_bf16": False}),
        ("step", "train.precision=fp16", [], []),
    ),
    "the step in fp32 on an old CPU": (
        (STEP_BOUND, 4000, 1900, {}, {"precision": "fp32", "has_bf16": False, "device": "cpu"}),
        ("step", None, [], ["precision"]),
    ),
    "the step with torch's norm": (
        (STEP_BOUND, 4000, 1900, {}, {"norm": "torch"}),
        ("step", "model.norm=twin", [], []),
    ),
    "the step in pieces": (
        (STEP_BOUND, 4000, 1900, {}, {"micro_batches": 4}),
        ("step", "fewer train.micro_batches", ["memory"], []),
    ),
    "distortions": (
        (STEP_BOUND | {"augment": 200}, 4000, 1900, {}, {"augment": "torch"}),
        ("augment", "data.augment.implementation=auto", ["Distorting"], []),
    ),
    "communication for statistics": (
        (
            STEP_BOUND | {"exposed communication": 60},
            4000,
            1900,
            {},
            {"ranks": 8, "ranks_per_host": 8, "cores": 64},
        ),
        ("collectives", "model.sync_bn=projector", ["60 of 195 ms", "statistics", "1.44 times"], []),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_verdict_names_the_limit_and_a_change_that_is_possible(case: str) -> None:
    (phases, loader, step, stages, settings), (limit, change, words, others) = CASES[case]
    given = profile(phases, loader, step, stages, **settings)
    given["collectives"] = [
        {
            "operation": "all_gather",
            "what": "statistics",
            "bytes": 64,
            "count": 50,
            "seconds": 1e-3,
            "bytes_per_second": 64e3,
        },
        {
            "operation": "all_reduce",
            "what": "gradients",
            "bytes": 1 << 25,
            "count": 4,
            "seconds": 1e-3,
            "bytes_per_second": 3e10,
        },
    ]
    verdict = judge(given)
    assert (verdict.limit, verdict.change) == (limit, change), verdict.sentence
    assert all(word in verdict.sentence for word in words), verdict.sentence
    assert not any(word in verdict.sentence for word in others), verdict.sentence
    assert verdict.sentence.endswith(".") and "\n" not in verdict.sentence
    assert verdict.ratio >= 1


def test_ratio_says_how_much_faster_the_run_could_be() -> None:
    given = profile(LOADER_BOUND, 740, 1900)
    assert judge(given).ratio == pytest.approx(1900 / given["run"]["pairs_per_second"])
    given = profile(STEP_BOUND, 4000, 1900)
    assert judge(given).ratio == pytest.approx(4000 / given["run"]["pairs_per_second"])
    given = profile(LOADER_BOUND, 740, 1900, ranks=2, ranks_per_host=2)  # the run's rate is that of both
    assert judge(given).ratio == pytest.approx(2 * 1900 / given["run"]["pairs_per_second"])


def test_a_host_that_is_hardly_ahead_of_the_gpu_limits_the_step() -> None:
    given = profile(STEP_BOUND, 4000, 1900)
    given["ceilings"]["step"]["host_lead_seconds"] = 0.001
    assert judge(given).change == "train.cuda_graph=true"
    given["settings"] = given["settings"] | {"cuda_graph": True}
    assert judge(given).change is None
    given["settings"] = given["settings"] | {"cuda_graph": False, "ranks": 2}
    assert judge(given).change == "a larger train.batch_size"


def with_straggler(extra_ms: dict, slow: int = 2, ranks: int = 4) -> dict:
    """All ranks do the same, one of them some phases longer, for which the others wait."""
    given = profile(STEP_BOUND | {"exposed communication": 3}, 4000, 1900, ranks=ranks, cores=64)
    excess = sum(extra_ms.values()) / 1000
    for rank in given["ranks"]:
        rank["step_seconds"] += excess
        if rank["rank"] == slow:
            rank["host"] = "node-b"
            for phase, ms in extra_ms.items():
                rank["phases"][phase] += ms / 1000
        else:
            rank["phases"]["exposed communication"] += excess
    given["run"] |= {key: given["ranks"][0][key] for key in ("step_seconds", "phases")}
    return given


@pytest.mark.parametrize(
    ("extra_ms", "cause", "words"),
    [
        ({"data wait": 100.0}, "loader", ["its own loader", "storage"]),
        ({"forward": 30.0, "backward": 70.0}, "compute", ["its own compute", "phase backward", "clock"]),
        ({"copy": 60.0, "backward": 40.0}, "loader", ["its own loader"]),
    ],
)
@pytest.mark.parametrize(("slow", "ranks"), [(2, 4), (0, 4), (1, 2)])
def test_straggler_is_named_with_its_host_excess_and_cause(
    extra_ms: dict, cause: str, words: list[str], slow: int, ranks: int
) -> None:
    given = with_straggler(extra_ms, slow, ranks)
    straggler = find_straggler(given["ranks"])
    assert (straggler["rank"], straggler["host"], straggler["cause"]) == (slow, "node-b", cause)
    assert straggler["excess_seconds"] == pytest.approx(0.1)
    verdict = judge(given)
    assert verdict.limit == "straggler"
    assert verdict.ratio == pytest.approx(238 / 138)
    for word in (f"Rank {slow} on node-b", "100 ms", "1.72 times", *words):
        assert word in verdict.sentence, verdict.sentence


def test_ranks_that_differ_little_have_no_straggler() -> None:
    assert judge(with_straggler({"backward": 15.0})).limit == "step"
    assert find_straggler(profile(STEP_BOUND, 1, 1)["ranks"]) is None


def test_waiting_for_a_late_rank_is_no_communication() -> None:
    """The rank that waits least shows what the collectives themselves cost."""
    given = with_straggler({"backward": 15.0})
    given["run"]["phases"]["exposed communication"] = 0.1
    assert judge(given).limit == "step"


def test_summary_shows_each_part_and_the_collectives_by_purpose() -> None:
    given = with_straggler({"backward": 100.0})
    given["collectives"] = [
        {
            "operation": "all_gather",
            "what": "statistics",
            "bytes": bytes_,
            "count": 2,
            "seconds": 1e-3,
            "bytes_per_second": 1,
        }
        for bytes_ in (1_000_000, 3_000_000)
    ]
    ceilings, split, ranks, communication = summary_tables(given)
    assert "for each of 4 ranks" in ceilings[0]
    assert [row[0] for row in ceilings[1][1:4]] == ["read, 2 threads", "decode, 2 threads", "crop, 2 threads"]
    assert split[1][-4][:2] == ("step", "238.00")
    assert ranks[1][3][:2] == ("2, node-b", "235.00")
    assert communication[1][1:] == [("all_gather of statistics", "4", "8", "4.00", "2")]
