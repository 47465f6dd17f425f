"""Workers end in silence when their consumer has left, speak of other failures, and inherit no garbage."""

import gc
import os
import sys

import pytest
from torch.utils.data import DataLoader

from pipelines.workers import start_worker


def test_only_a_lost_consumer_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: reported.append(error))
    start_worker(0)
    gc.unfreeze()
    failure = ValueError("something else")
    for error in (ConnectionResetError(), EOFError(), failure):
        sys.excepthook(type(error), error, None)
    assert reported == [failure]


class Threads:
    """Can be collected in the process that made it alone; and only by the garbage collector."""

    def __init__(self) -> None:
        self.myself, self.process = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os._exit(3)


class Collects:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


@pytest.mark.timeout(60)
def test_garbage_of_the_main_process_is_not_collected_in_a_worker() -> None:
    gc.disable()
    try:
        Threads()
        loader = DataLoader(Collects(), num_workers=1, worker_init_fn=start_worker)
        assert [batch.tolist() for batch in loader] == [[0]]
    finally:
        gc.enable()
