"""Work ahead in a thread: nothing lost, nothing doubled, no error swallowed, nothing left running."""

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from pipelines.prefetch import Prefetcher


def numbers(end: int, made: list[int], ended: threading.Event | None = None) -> Iterator[int]:
    try:
        for number in range(end):
            made.append(number)
            yield number
    finally:
        if ended is not None:
            ended.set()


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_items_come_in_order_and_once(depth: int) -> None:
    ahead = Prefetcher(numbers(50, []), depth)
    assert list(ahead) == list(range(50))
    assert list(ahead) == []  # still at its end
    ahead.close()


def test_no_more_than_depth_are_made_ahead() -> None:
    made: list[int] = []
    ahead = Prefetcher(numbers(50, made), depth=3)
    for taken in range(5):
        assert next(ahead) == taken
        assert len(made) <= taken + 1 + 3 + 1  # taken, ready, and the one that waits for room
    ahead.close()
    assert len(made) <= 5 + 3 + 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_error_reaches_the_consumer_after_the_items_before_it(error: BaseException) -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise error

    ahead = Prefetcher(failing(), depth=1)
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(type(error)):
            next(ahead)
    ahead.close()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_close_ends_the_generator_and_the_thread(taken: int) -> None:
    before, ended = set(threading.enumerate()), threading.Event()
    items = numbers(1000, [], ended)
    ahead = Prefetcher(items, depth=2)
    for _ in range(taken):
        next(ahead)
    ahead.close()
    ahead.close()
    assert set(threading.enumerate()) == before
    assert ended.is_set() or items.gi_frame is None  # never begun, or ended where it stood


def test_what_a_failed_generator_held_goes_at_once() -> None:
    """Not when the garbage collector comes, which may be in a process that was forked meanwhile."""
    held: list[weakref.ref] = []

    class Threads:
        pass

    def failing() -> Iterator[int]:
        threads = Threads()
        held.append(weakref.ref(threads))
        yield 1
        raise ValueError("bad")

    gc.disable()
    try:
        ahead = Prefetcher(failing(), depth=1)
        with pytest.raises(ValueError, match="bad"):
            list(ahead)
        ahead.close()
        assert held[0]() is None
    finally:
        gc.enable()


def test_closed_prefetcher_is_not_kept_alive() -> None:
    ahead = Prefetcher(numbers(10, []), depth=2)
    next(ahead)
    ahead.close()
    reference = weakref.ref(ahead)
    del ahead
    gc.collect()
    assert reference() is None
