"""Worker processes end in silence when their consumer has left, and speak of every other failure."""

import sys

import pytest

from pipelines.workers import be_quiet_about_a_lost_consumer


def test_only_a_lost_consumer_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: reported.append(error))
    be_quiet_about_a_lost_consumer(0)
    failure = ValueError("something else")
    for error in (ConnectionResetError(), EOFError(), failure):
        sys.excepthook(type(error), error, None)
    assert reported == [failure]
