"""The page of a profile stands alone and shows what was measured; two profiles are compared fairly."""

import copy
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools.profile.compare import compare, comparison_sentence, comparison_tables
from tools.profile.page import PAGE_NAME, write_page
from train.errors import TrainingError

PHASES = {
    "data wait": 0.03,
    "augment": 0.01,
    "forward": 0.02,
    "loss": 0.002,
    "backward": 0.03,
    "optimizer": 0.008,
}
PROFILE = {
    "environment": {"device": "CPU", "torch": "2.15.0"},
    "settings": {"backbone": "resnet18", "batch_size": 8, "ranks": 1, "workers": 2, "loader": "ffcv"},
    "steps": 20,
    "ceilings": {
        name: {"pairs_per_second": rate, "cores_used": 1.0}
        for name, rate in (("read", 90000.0), ("decode", 120.0), ("loader", 100.0), ("step", 400.0))
    },
    "collectives": [],
    "run": {
        "pairs_per_second": 80.0,
        "step_seconds": 0.1,
        "step_seconds_percentiles": {"p10": 0.09, "p50": 0.1, "p90": 0.12},
        "phases": PHASES,
    },
    "ranks": [{"rank": 0, "host": "a", "step_seconds": 0.1, "phases": PHASES, "busy_seconds": 0.07}],
    "verdict": {"limit": "decode", "sentence": "Decode <limits>: 120 pairs/s.", "change": "", "ratio": 4.0},
}
MORE = {
    "peaks": {"flops": 4e10, "bytes_per_second": 8e9, "precision": "fp32"},
    "kernels": {
        "shares": {"convolution": 0.75, "matrix products": 0.25},
        "rows": [
            {"kind": "convolution", "name": "conv", "seconds": 0.03, "flop": 6e8, "bytes": 3e7, "calls": 40},
            {
                "kind": "matrix products",
                "name": "addmm",
                "seconds": 0.01,
                "flop": 1e8,
                "bytes": None,
                "calls": 6,
            },
        ],
        "flop_per_step": 7e8,
        "bytes_per_step": 3e7,
        "mfu": 0.175,
        "bandwidth_share": None,
        "trace": "trace.json.gz",
    },
    "utilisation": {
        "source": "nvml",
        "samples": 50,
        "gpu": {"kernel_ran": 0.98, "sm_active": None, "power_watts": 312.0, "throttle_reasons": []},
        "cpu": {"per_core": [0.9, 0.1], "mean": 0.5, "busiest_thread": 0.99},
        "warnings": ["Some kernel ran 98 % of the time, which says little."],
        "timeline": {"seconds": [0.0, 0.1], "cpu": [0.4, 0.6]},
    },
}


class Links(HTMLParser):
    """Collects whatever a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href"):
                self.loaded.append(value or "")
        self.pictures += tag == "img" and bool(dict(attrs).get("alt"))


def page_of(profile: dict, folder: Path) -> tuple[str, Links]:
    write_page(profile, folder)
    page = (folder / PAGE_NAME).read_text()
    links = Links()
    links.feed(page)
    return page, links


def slower(factor: float) -> dict:
    profile = copy.deepcopy(PROFILE)
    run = profile["run"]
    run["pairs_per_second"] /= factor
    run["step_seconds_percentiles"] = {k: factor * v for k, v in run["step_seconds_percentiles"].items()}
    run["phases"]["data wait"] *= factor
    return profile


def test_page_loads_nothing_and_begins_with_the_verdict(tmp_path: Path) -> None:
    page, links = page_of(PROFILE, tmp_path)
    assert all(link.startswith("data:image/png;base64,") for link in links.loaded)
    assert links.pictures == len(links.loaded) == 2
    assert page.index("Decode &lt;limits&gt;") < page.index("What each part could do")
    assert "What the time is spent on" not in page and "The ranks" not in page


def test_page_shows_kernels_use_and_ranks_where_they_were_measured(tmp_path: Path) -> None:
    profile = PROFILE | MORE
    profile["ranks"] = [PROFILE["ranks"][0] | {"rank": n, "host": f"node{n}"} for n in range(2)]
    profile["settings"] = PROFILE["settings"] | {"ranks": 2}
    row = {"operation": "all_reduce", "what": "gradients", "bytes": 1e6, "count": 1, "seconds": 1e-3}
    profile["collectives"] = [row | {"bytes_per_second": 1e9}]
    page, links = page_of(profile, tmp_path)
    assert links.pictures == 6
    for shown in (
        "node1",
        "convolution: conv",
        "0.02",
        "18% of the products",
        "Some kernel ran",
        "312",
        "not known",
    ):
        assert shown in page, shown
    assert "memory bandwidth" not in page  # which was not measured


def test_a_change_within_the_spread_is_said_to_be_one() -> None:
    small, large = compare(PROFILE, slower(1.1)), compare(PROFILE, slower(2.0))
    assert small["speed"]["ratio"] == pytest.approx(1 / 1.1)
    assert "within the spread" in comparison_sentence(small)
    assert "more than the spread" in comparison_sentence(large)
    assert large["phases"]["data wait"] == (0.03, 0.06) and large["phases"]["loss"] == (0.002, 0.002)


def test_what_differs_between_two_profiles_is_named() -> None:
    after = copy.deepcopy(PROFILE) | MORE
    after["settings"]["workers"] = 4
    after["ceilings"].pop("read")
    result = compare(PROFILE, after)
    assert result["changed"] == {"workers": (2, 4)}
    assert result["ceilings"]["read"] == (90000.0, None)
    assert result["kernels"]["convolution"] == (None, 0.75)
    cells = [cell for _, rows in comparison_tables(result) for row in rows for cell in row]
    assert {"workers", "75.0%", "read alone", "-"} <= set(cells)
    after["settings"]["batch_size"] = 16
    assert "different sizes" in comparison_sentence(compare(PROFILE, after))


def test_files_that_are_no_profiles_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"^The second file is not a profile, as it lacks 'run'; .*\.$"):
        compare(PROFILE, {name: part for name, part in PROFILE.items() if name != "run"})
