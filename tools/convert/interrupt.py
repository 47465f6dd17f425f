"""Ctrl-C, pressed once or many times."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def single_interrupt() -> Iterator[None]:
    """The first Ctrl-C raises `KeyboardInterrupt` as ever; those after it count for nothing.

    So the block ends in order, however impatient the user. Also a decorator. Outside of the main thread, or
    where somebody else handles Ctrl-C, it does nothing.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN: Python warns if one is on its way
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
