"""What the worker processes of torch's `DataLoader` need wherever they are used."""

import sys
from collections.abc import Iterator
from types import TracebackType

# What the main process meets where a worker dies: torch's own error, or the end of a batch under way.
LOST_WORKER = RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError, FileNotFoundError


def be_quiet_about_a_lost_consumer(worker_id: int) -> None:
    """For `worker_init_fn`: print no traceback where the consumer leaves while a batch is handed over.

    That is how Ctrl-C ends a run; the thread that hands over reports through `sys.excepthook`.
    """
    report = sys.excepthook

    def report_others(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            report(kind, error, traceback)

    sys.excepthook = report_others


def stop_workers(batches: Iterator | None) -> None:
    """End the workers behind a `DataLoader`'s iterator.

    Until then torch raises the death of each one of them, wherever the main process happens to be.
    """
    if hasattr(batches, "_shutdown_workers"):  # not without workers
        batches._shutdown_workers()
