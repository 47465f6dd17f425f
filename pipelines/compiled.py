"""How this project compiles with numba: without the GIL, and kept on disk where that is possible."""

import logging
from collections.abc import Callable
from threading import Lock
from typing import Any

from numba import njit

_log = logging.getLogger(__name__)


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """`numba.njit` without the GIL, and with divisions that do not look for zeros first."""
    return njit(nogil=True, error_model="numpy", **options)


def cached(function: Callable) -> Callable:
    """Compiled at its first call, and kept on disk for later processes where that is possible."""
    try:
        kept = compiled(cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return compiled()(function)
    chosen, lock = kept, Lock()

    def call(*arguments: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*arguments)
        except Exception as error:  # a full disk, or whatever reading a damaged file raises
            with lock:
                if chosen is kept:
                    anew = compiled()(function)
                    result = anew(*arguments)  # raises what was not the cache's fault
                    _log.warning("numba's cache fails (%r): compiled %s anew.", error, function.__name__)
                    chosen = anew
                    return result
        return chosen(*arguments)

    return call
