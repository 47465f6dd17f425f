"""Every epoch is a permutation; the global batches do not depend on the number of ranks."""

import numpy as np
import pytest

from pipelines.errors import DataError
from pipelines.order import WINDOW, epoch_permutation, rank_slice, samples_ahead, steps_per_epoch


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000, 4097])
def test_an_epoch_visits_every_sample_once(num_samples):
    permutation = epoch_permutation(num_samples, seed=5, epoch=3)
    assert permutation.dtype == np.int64
    np.testing.assert_array_equal(np.sort(permutation), np.arange(num_samples))


def test_order_depends_on_seed_and_epoch_alone():
    first = epoch_permutation(1000, seed=1, epoch=0)
    np.testing.assert_array_equal(first, epoch_permutation(1000, seed=1, epoch=0))
    for other in (epoch_permutation(1000, seed=2, epoch=0), epoch_permutation(1000, seed=1, epoch=1)):
        # Two unrelated permutations agree in one place on average, in more than 10 with p < 1e-7.
        assert (first == other).sum() <= 10


def test_every_sample_is_as_likely_at_every_place():
    """Chi-squared over (sample, place) of 4,000 epochs of 6 samples."""
    counts = np.zeros((6, 6))
    for epoch in range(4000):
        counts[epoch_permutation(6, seed=9, epoch=epoch), np.arange(6)] += 1
    expected = 4000 / 6
    chi_squared = ((counts - expected) ** 2 / expected).sum()  # 25 degrees of freedom: deviation 7
    assert chi_squared < 65


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_the_same_global_batches(world_size):
    num_samples, batch_size = 103, 12
    permutation = epoch_permutation(num_samples, seed=0, epoch=0)
    steps = steps_per_epoch(num_samples, batch_size, world_size)
    assert steps == 8
    for step in range(steps):
        slices = [rank_slice(permutation, step, batch_size, r, world_size) for r in range(world_size)]
        assert {len(s) for s in slices} == {batch_size // world_size}
        np.testing.assert_array_equal(
            np.concatenate(slices), permutation[step * batch_size : (step + 1) * batch_size]
        )


def test_a_batch_larger_than_the_dataset_is_refused():
    assert steps_per_epoch(100, 100) == 1
    with pytest.raises(DataError, match=r"batch of 101 is larger .* of 100 .*train\.batch_size"):
        steps_per_epoch(100, 101)


def test_a_batch_that_the_ranks_cannot_share_evenly_is_refused():
    with pytest.raises(DataError, match=r"batch of 10 .* over 4 processes; .* multiple of 4"):
        steps_per_epoch(100, 10, world_size=4)


def group_sizes(num_groups: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 9, num_groups)


@pytest.mark.parametrize("num_groups", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 17])
def test_with_groups_an_epoch_visits_every_sample_once(num_groups):
    sizes_G = group_sizes(num_groups, 1)
    permutation = epoch_permutation(sizes_G.sum(), seed=5, epoch=3, group_sizes_G=sizes_G)
    assert permutation.dtype == np.int64
    np.testing.assert_array_equal(np.sort(permutation), np.arange(sizes_G.sum()))


def test_every_window_has_whole_groups_of_its_own():
    sizes_G = group_sizes(3 * WINDOW + 17, 2)
    group_N = np.repeat(np.arange(len(sizes_G)), sizes_G)
    windows = []
    for epoch in (0, 1):
        groups_N = group_N[epoch_permutation(sizes_G.sum(), seed=5, epoch=epoch, group_sizes_G=sizes_G)]
        _, first_N = np.unique(groups_N, return_index=True)
        in_order = groups_N[np.sort(first_N)]  # groups as they come up
        start = 0
        for window in range(4):
            # The window ends where as many samples have come as its groups hold: they are these groups alone.
            ours = in_order[WINDOW * window : WINDOW * (window + 1)]
            end = start + sizes_G[ours].sum()
            assert set(groups_N[start:end]) == set(ours)
            assert np.abs(np.diff(groups_N[start:end])).mean() > len(sizes_G) / 10  # and mixed
            start = end
        assert start == sizes_G.sum()
        windows.append(frozenset(in_order[:WINDOW].tolist()))
    assert len(windows[0] & windows[1]) < WINDOW * 0.6  # other groups in the next epoch; a third by chance


def test_groups_of_one_window_change_nothing():
    sizes_G = group_sizes(WINDOW, 3)
    num_samples = int(sizes_G.sum())
    with_groups = epoch_permutation(num_samples, seed=5, epoch=3, group_sizes_G=sizes_G)
    np.testing.assert_array_equal(with_groups, epoch_permutation(num_samples, seed=5, epoch=3))


def test_reading_a_window_ahead_covers_the_next_window():
    sizes_G = np.full(5 * WINDOW, 7)
    assert samples_ahead(sizes_G) == 7 * WINDOW
