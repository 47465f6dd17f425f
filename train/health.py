"""Signs in the reports of a run that it goes astray: spikes of the loss, and embeddings that collapse.

Barlow Twins is not meant to collapse, but wrong learning rates, broken data or half precision can make it:
to a point (no feature varies any more, so that the loss sees nothing), to a line (all features tell the
same), or to noise (the views of an image have nothing to do with each other).
"""

import math
from collections import deque
from statistics import median

from train.metrics import StepReport

SPIKE = 2.0  # times the usual loss
USUAL = 20  # reports that make the usual loss
MIN_USUAL = 5
PATIENCE = 5  # reports in a row before a collapse is believed

AGREEMENT = 0.2  # of two views, mean C_ii or so; untrained networks have about half of that

_COLLAPSES = (  # field of the report, limit, what it means to be above it
    (
        "dead_features",
        0.5,
        "The embeddings have collapsed to a point: {value:.0%} of the features vary less between images than "
        "the loss can see",
    ),
    (
        "off_diagonal",
        0.95,
        "The embeddings have collapsed to a line: different features correlate by {value:.2f}",
    ),
    (
        "diagonal_error",
        0.95,
        "The embeddings have collapsed to noise: the views of an image agreed before, and do no more",
    ),
)


class Health:
    """Looks at one report after the other; a collapse is told once, until it has passed."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=USUAL)
        self._in_a_row = dict.fromkeys((field for field, _, _ in _COLLAPSES), 0)
        self._have_agreed = False  # before, views that do not agree are nothing new

    def look(self, report: StepReport) -> list[str]:
        """A sentence for each thing that is newly amiss, without a full stop at its end."""
        return [*self._spikes(report), *self._collapses(report)]

    def _spikes(self, report: StepReport) -> list[str]:
        usual = median(self._losses) if len(self._losses) >= MIN_USUAL else float("inf")
        if math.isfinite(report.loss):
            self._losses.append(report.loss)
        largest = report.largest_loss
        if largest is None or not largest > SPIKE * usual:
            return []
        return [f"The loss rose to {largest:.4g} since the last report, where {usual:.4g} was usual"]

    def _collapses(self, report: StepReport) -> list[str]:
        told = []
        for field, limit, sentence in _COLLAPSES:
            value = getattr(report, field)
            is_above = (
                value is not None and value > limit and (field != "diagonal_error" or self._have_agreed)
            )
            self._in_a_row[field] = self._in_a_row[field] + 1 if is_above else 0
            if self._in_a_row[field] == PATIENCE:
                told.append(sentence.format(value=value))
        error = report.diagonal_error
        self._have_agreed |= error is not None and error < 1 - AGREEMENT
        return told
