"""Samples that turn out in training to be unreadable, and which samples take their places."""

import logging
from collections.abc import Callable, Iterable

import numpy as np

from pipelines.errors import DataError

MAX_SHARE = 0.01  # more unreadable samples than this share of the dataset stop a run
MIN_ALLOWED = 8  # of small datasets, this many are allowed whatever their share

_log = logging.getLogger(__name__)


class BadSamples:
    """What one process knows to be unreadable.

    The place of such a sample is taken by the next readable one in the dataset, with that one's label and
    random numbers. So the batch depends on the dataset alone, not on when or where the fault was found.
    """

    def __init__(self, num_samples: int, *, stop: bool, log: bool = True) -> None:
        """`stop`: the first bad sample ends the run. `log`: warn of each."""
        self.reasons: dict[int, str] = {}  # by sample index
        self._num_samples, self._stop, self._log = num_samples, stop, log

    def report(self, index: int, error: DataError) -> None:
        """Remember that a sample is bad. Raises `DataError` where the run has to stop for it."""
        if self._stop:
            raise error
        if index in self.reasons:
            return
        count = len(self.reasons) + 1
        if count > min(max(MIN_ALLOWED, MAX_SHARE * self._num_samples), self._num_samples - 1):
            raise DataError(
                f"{count} of the dataset's {self._num_samples} images cannot be read, the last one for this "
                f"reason: {error}"
            ) from error
        self.reasons[int(index)] = str(error)
        if self._log:
            _log.warning("%s Meanwhile the next readable image takes its place.", error)

    def find(self, read: Callable[[int], object], indices: Iterable[int]) -> bool:
        """Report those of `indices` that `read` raises `DataError` for; whether there are any."""
        found = False
        for index in indices:
            try:
                read(index)
            except DataError as error:
                self.report(index, error)
                found = True
        return found

    def stand_ins(self, indices_N: np.ndarray) -> np.ndarray:
        """`indices_N` with the next sample not known to be bad in the place of each one that is."""
        if not self.reasons:
            return indices_N
        return np.array([self._stand_in(index) for index in indices_N.tolist()], dtype=indices_N.dtype)

    def _stand_in(self, index: int) -> int:
        while index in self.reasons:  # ends, as `report` never takes the last sample
            index = (index + 1) % self._num_samples
        return index
