"""The generator gives the published numbers, and its uniforms are uniform."""

import numpy as np
import pytest

from pipelines.random_bits import philox_u32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_the_generators_authors(counter, seed, expected):
    """Random123's file of known answers, philox4x32 with 10 rounds."""
    assert tuple(philox_u32(seed, *counter).tolist()) == expected


def test_counter_words_broadcast_and_every_element_stands_alone():
    index_N, block_B1 = np.arange(5), np.arange(3)[:, None]
    words_4BN = philox_u32(7, index_N, 2, 1, block_B1)
    assert words_4BN.shape == (4, 3, 5)
    assert words_4BN.dtype == np.uint32
    for b in range(3):
        for n in range(5):
            np.testing.assert_array_equal(words_4BN[:, b, n], philox_u32(7, n, 2, 1, b))


def test_seed_and_every_counter_word_change_the_numbers():
    base = (3, 4, 5, 6, 7)
    changed = [tuple(x + (i == k) for i, x in enumerate(base)) for k in range(5)] + [(3 + 2**32, 4, 5, 6, 7)]
    results = {tuple(philox_u32(*numbers).tolist()) for numbers in [base, *changed]}
    assert len(results) == 7


def test_uniform_lies_in_0_to_1_and_is_spread_evenly():
    assert uniform(np.array([0, ONES], dtype=np.uint32)).tolist() == [0, 1 - 2**-32]
    counts, _ = np.histogram(uniform(philox_u32(11, np.arange(50_000), 0, 0, 0)), bins=100, range=(0, 1))
    chi_squared = ((counts - 2000) ** 2 / 2000).sum()  # 99 degrees of freedom: mean 99, deviation 14
    assert 45 < chi_squared < 175
