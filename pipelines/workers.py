"""What the worker processes of torch's `DataLoader` need wherever they are used."""

import sys
from types import TracebackType


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
