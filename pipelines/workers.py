"""What the worker processes of torch's `DataLoader` need wherever they are used."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from pipelines.errors import DataError

T = TypeVar("T")

# What taking a batch meets where a worker dies: torch's own error, or the end of a batch under way.
LOST_WORKER = RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError, FileNotFoundError
_TORCHS_OWN = "DataLoader worker"  # begins the `RuntimeError` that torch raises at the death of a worker


def start_worker(worker_id: int) -> None:
    """For `worker_init_fn`.

    1. Leave alone what the main process has: its garbage, once collected here, would wait for threads that a
       fork does not bring along, such as DALI's.
    2. Print no traceback where the consumer leaves while a batch is handed over, which is how Ctrl-C ends a
       run; the thread that hands over reports through `sys.excepthook`.
    3. Live on where a scheduler asks all processes to stop: the main process finishes its step first, and
       needs the batches for it. Only the main process ends its workers.
    """
    gc.freeze()  # 1
    _be_quiet_about_a_lost_consumer()  # 2
    _answer_to(os.getppid())  # 3


def _answer_to(parent: int) -> None:
    """Pass over SIGUSR1, and SIGTERM of any process but `parent`."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_request, args=(parent,), daemon=True).start()


def _end_on_request(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _be_quiet_about_a_lost_consumer() -> None:
    report = sys.excepthook

    def report_others(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            report(kind, error, traceback)

    sys.excepthook = report_others


def stop_workers(batches: Iterator | None) -> None:
    """End the workers behind a `DataLoader`'s iterator, and the threads that feed them.

    Until then torch raises the death of each one of them, wherever the main process happens to be.
    """
    if not hasattr(batches, "_shutdown_workers"):  # without workers
        return
    batches._shutdown_workers()
    for queue in batches._index_queues:  # torch closes them, and leaves their threads to end some time
        if queue._thread is not None:
            queue._thread.join()


def taken(batches: Iterator[T], advice: str) -> Iterator[T]:
    """What the workers deliver. The death of one is a `DataError`, which gives the user's `advice`."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except LOST_WORKER as error:
            raise _lost(advice, error) from error
        yield batch


@contextmanager
def deaths_explained(advice: str) -> Iterator[None]:
    """The same for what is done between two batches: torch raises the death of a worker at any place."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_TORCHS_OWN):
            raise
        raise _lost(advice, error) from error


def _lost(advice: str, error: Exception) -> DataError:
    return DataError(
        "A worker process that decodes images ended unexpectedly, probably for lack of (shared) memory; "
        f"{advice} ({error})."
    )
