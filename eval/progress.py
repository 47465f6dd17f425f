"""How far an evaluation has come."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # done, in all: images, or what else the evaluation counts


def shifted(progress: Progress | None, before: int, total: int) -> Progress:
    """For a part of the work, when `before` of `total` are done by then; the part's own total is not told."""
    return lambda done, _: progress(before + done, total) if progress is not None else None
