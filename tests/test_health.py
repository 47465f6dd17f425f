"""A run that goes astray is told, once for each time, and a sound one is left in peace."""

from dataclasses import replace

import pytest

from train.health import MIN_USUAL, PATIENCE, Health
from train.metrics import StepReport

SOUND = replace(
    StepReport(30, 200, 1, 100.0, 10.0, 460.0, 0.1, 0.01, 321.6, 0.25, 0, 60.0, 3725.4),
    largest_loss=110.0,
    diagonal_error=0.5,
    off_diagonal=0.1,
    embedding_std=0.2,
    dead_features=0.0,
)


def looked(health: Health, *reports: StepReport) -> list[str]:
    return [sentence for report in reports for sentence in health.look(report)]


def test_sound_run_is_left_in_peace() -> None:
    """Also an untrained one, whose views do not agree yet, a falling loss, and ablations without figures."""
    untrained = replace(SOUND, loss=420.0, largest_loss=425.0, diagonal_error=0.99)
    falling = [replace(SOUND, loss=400.0 - n, largest_loss=401.0 - n) for n in range(50)]
    ablation = replace(SOUND, diagonal_error=None, off_diagonal=None, largest_loss=None)
    health = Health()
    assert looked(health, *[untrained] * 20, *falling, *[SOUND] * 20, *[ablation] * 20) == []


def test_spike_between_two_reports_is_told() -> None:
    health = Health()
    spike = replace(SOUND, largest_loss=201.0)
    assert looked(health, *[spike] * MIN_USUAL) == []  # what is usual is not known yet
    assert looked(health, spike, SOUND) == ["The loss rose to 201 since the last report, where 100 was usual"]
    assert looked(health, replace(SOUND, largest_loss=199.0)) == []
    assert looked(health, replace(SOUND, loss=float("nan"), largest_loss=float("nan"))) == []
    assert len(looked(health, spike)) == 1


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("dead_features", "collapsed to a point: 97% of the features"),
        ("off_diagonal", "collapsed to a line: different features correlate by 0.97"),
        ("diagonal_error", "collapsed to noise"),
    ],
)
def test_collapse_is_told_when_it_lasts_and_again_when_it_returns(field: str, words: str) -> None:
    health = Health()
    collapsed = replace(SOUND, **{field: 0.97})
    assert looked(health, SOUND, *[collapsed] * (PATIENCE - 1), SOUND) == []
    for _ in range(2):
        (sentence,) = looked(health, *[collapsed] * 10)
        assert words in sentence
        assert looked(health, SOUND) == []
