"""The plan of the loss: arithmetic that anyone can check, and the choices that follow from it."""

import pytest
import torch

from model.loss import ALGORITHMS, choose
from model.loss.plan import ALGORITHMS_PLANNED, Hardware, estimate, plan

GPU = Hardware(flops=600e12, memory_bandwidth=2e12, link_bandwidth=10e9, memory=60e9)


def by_name(*arguments, hardware: Hardware = GPU) -> dict:
    return {name: estimate(name, *arguments, hardware) for name in ALGORITHMS_PLANNED}


def test_every_algorithm_is_planned() -> None:
    assert list(ALGORITHMS_PLANNED) == list(ALGORITHMS)


def test_products_are_counted_as_in_the_papers_setting() -> None:
    """2048 samples of 8192 features: 2 N D^2 forward and twice that backward, against 8 N^2 D."""
    costs = by_name(2048, 8192, 1, 2)
    assert costs["dense"].flop == 6 * 2048 * 8192**2
    assert costs["gram"].flop == costs["sharded"].flop == 8 * 2048**2 * 8192
    costs = by_name(2048, 8192, 32, 2)
    assert costs["dense"].flop == 6 * 64 * 8192**2
    assert costs["gram"].flop == costs["sharded"].flop == 8 * 2048**2 * 256


def test_at_32_ranks_sharding_sends_over_8_times_less_than_the_all_reduce_of_c() -> None:
    all_reduce_of_c = 2 * 31 / 32 * 8192**2 * 4
    costs = by_name(2048, 8192, 32, 2)
    assert costs["dense"].bytes_sent > all_reduce_of_c
    assert all_reduce_of_c / costs["sharded"].bytes_sent > 14


def test_one_process_sends_nothing() -> None:
    assert all(cost.bytes_sent == 0 for cost in by_name(256, 512, 1, 4).values())


@pytest.mark.parametrize(
    ("arguments", "algorithm"),
    [
        ((256, 8192, 1, 2), "gram"),
        ((2048, 8192, 1, 4), "gram"),
        ((8192, 1024, 1, 4), "dense"),
        ((2048, 8192, 32, 2), "sharded"),
        ((8192, 8192, 32, 2), "gram"),
        ((32768, 2048, 32, 2), "dense"),
    ],
)
def test_the_quickest_is_chosen(arguments: tuple, algorithm: str) -> None:
    made = plan(*arguments, GPU)
    assert made.algorithm == algorithm
    assert made.algorithm == min(made.estimates, key=lambda e: e.milliseconds).algorithm
    assert made.reason.startswith(f"{algorithm} is predicted to be the quickest (dense ")


def test_memory_comes_before_speed() -> None:
    full = plan(8192, 1024, 1, 4, GPU._replace(memory=1e9))
    assert full.algorithm == "dense"
    dense, gram = full.estimates
    arguments = (256, 8192, 1, 4)
    assert plan(*arguments, GPU._replace(memory=60e6)).reason.endswith("as dense would not")
    assert plan(*arguments, GPU._replace(memory=1e3)).reason == "gram needs the least memory, and none fits"
    assert gram.peak_bytes > dense.peak_bytes


def test_a_faster_link_changes_the_choice() -> None:
    """Gathering sends more than sharding, but leaves no N x N matrix to be summed and copied."""
    arguments = (4096, 16384, 32, 2)
    assert plan(*arguments, GPU).algorithm == "sharded"
    assert plan(*arguments, GPU._replace(link_bandwidth=1e14)).algorithm == "gram"


def test_fewer_features_than_ranks_are_not_sharded() -> None:
    assert [e.algorithm for e in plan(64, 3, 4, 4, GPU).estimates] == ["dense", "gram"]


def test_the_choice_for_this_machine_is_logged_once(caplog) -> None:
    choose.choose_algorithm.cache_clear()
    cpu = torch.device("cpu")
    with caplog.at_level("INFO"):
        names = {choose.choose_algorithm(64, 2048, 1, torch.float32, cpu) for _ in range(2)}
    assert names == {"gram"}
    (message,) = caplog.messages
    assert message.startswith(
        "Loss for 64 samples of width 2048, ranks: 1. Gram is predicted to be the quickest"
    )
