"""Batches made ahead of time in a thread of their own, on a CUDA stream of their own."""

import atexit
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from traceback import clear_frames
from typing import Generic, TypeVar

import torch

from pipelines.batch import Batch

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Runs a generator in a thread that keeps up to `depth` items ready.

    What the generator raises, the consumer's `next` raises, after the items before it. `close` ends the
    generator where it stands, joins the thread and may be called twice; the end of the process calls it too.
    """

    def __init__(self, items: Generator[T, None, None], depth: int) -> None:
        self._items, self._depth = items, depth
        self._ready: deque[T] = deque()
        self._end: BaseException | None = None  # what the consumer gets after the last item
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fastbarlow prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._end is not None)
            if not self._ready:
                raise self._end
            item = self._ready.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # where the garbage collector may run
            self._thread.join()
        self._ready.clear()
        atexit.unregister(self.close)

    def _run(self) -> None:
        end: BaseException = StopIteration()
        try:
            with closing(self._items):
                for item in self._items:
                    if not self._put(item):
                        break
        except BaseException as error:
            # Else what the frames hold, such as DALI's threads, would live until the garbage collector finds
            # it; in a process that was forked meanwhile, which lacks these threads, it would crash or hang.
            clear_frames(error.__traceback__)
            end = error
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        """False where the consumer has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._ready) < self._depth)
            if not self._is_closed:
                self._ready.append(item)
                self._changed.notify_all()
            return not self._is_closed


@dataclass(frozen=True)
class _Queued:
    batch: Batch
    is_there: torch.cuda.Event | None  # of the stream that makes the batch; None on the CPU


def prefetch(
    batches: Generator[Batch, None, None], depth: int, device: torch.device
) -> Generator[Batch, None, None]:
    """The same batches, `depth` of them made ahead in a thread; closing this generator ends that thread.

    On a GPU the thread's work runs on a side stream. A batch is valid on the stream that is the consumer's
    current one when it takes the batch, and the host waits for nothing.
    """
    with closing(Prefetcher(_on_side_stream(batches, device), depth)) as ahead:
        for queued in ahead:
            if queued.is_there is not None:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(queued.is_there)
                queued.batch.record_stream(stream)
            yield queued.batch


def _on_side_stream(
    batches: Generator[Batch, None, None], device: torch.device
) -> Generator[_Queued, None, None]:
    """Runs in the thread, whose current device and stream are other ones than the consumer's."""
    is_cuda = device.type == "cuda"
    side = torch.cuda.Stream(device) if is_cuda else None
    with closing(batches), torch.cuda.stream(side) if is_cuda else nullcontext():
        for batch in batches:
            yield _Queued(batch, side.record_event() if is_cuda else None)
