"""Workers end in silence when their consumer has left, speak of other failures, and inherit no garbage.

What a scheduler tells all processes is for the main process alone.
"""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from pipelines.workers import _be_quiet_about_a_lost_consumer, start_worker, stop_workers


def test_only_a_lost_consumer_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: reported.append(error))
    _be_quiet_about_a_lost_consumer()
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
        gc.collect()  # here, or it would end the workers of the next test


class Pids:
    """Each sample is the process that loads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.timeout(60)
def test_a_scheduler_does_not_end_workers_and_their_parent_does() -> None:
    batches = iter(DataLoader(Pids(), num_workers=1, worker_init_fn=start_worker, prefetch_factor=1))
    worker = next(batches).item()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # by another process than the parent
        subprocess.run(["/bin/kill", f"-{number}", str(worker)], check=True)
    assert [batch.item() for batch in batches] == 7 * [worker]
    stop_workers(batches)
    assert not Path(f"/proc/{worker}").exists()

    batches = iter(DataLoader(Pids(), num_workers=1, worker_init_fn=start_worker, prefetch_factor=1))
    next(batches)
    process = batches._workers[0]
    process.terminate()
    process.join(20)
    assert process.exitcode == 0
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(batches)
    stop_workers(batches)


@pytest.mark.timeout(60)
def test_workers_of_a_killed_process_end() -> None:
    """Though they pass over SIGTERM."""
    receiver, sender = os.pipe()
    parent = os.fork()
    if parent == 0:
        batches = iter(DataLoader(Pids(), num_workers=1, worker_init_fn=start_worker, prefetch_factor=1))
        os.write(sender, str(next(batches).item()).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    worker = Path(f"/proc/{os.read(receiver, 20).decode()}/stat")
    os.waitpid(parent, 0)
    os.close(receiver), os.close(sender)
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.1)
