"""FFCV's compiled threads, with a decoder that decodes each image once for both views.

FFCV's own decoders draw their crops themselves and decode once per view. Ours reads the crop boxes from
memory that belongs to the batch, because numba freezes everything that compiled code refers to otherwise.
FFCV resizes with OpenCV's INTER_AREA (bilinear where it enlarges), not bicubic.

Shape legend: V views (2), N samples, H, W height and width.
"""

import atexit
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from queue import Full

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, memcpy, resize_crop
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State

from pipelines.batch import Batch, ViewParams, to_device
from pipelines.errors import DataError
from pipelines.loaders import EpochLoader, LoaderJob
from pipelines.source import BetonSource, open_source, read_image

POLL_S = 0.1  # how often a thread that waits for room looks whether it has been closed


class FfcvLoader(EpochLoader):
    """Reads .beton files only."""

    def __init__(self, job: LoaderJob) -> None:
        source = open_source(job.config.path)
        if not isinstance(source, BetonSource):
            raise DataError(
                f"The loader 'ffcv' reads .beton files, not the folder {source.path}; "
                "run `fastbarlow convert` first or set data.loader to folder or dali."
            )
        super().__init__(job, len(source))
        self._source = source
        self._loader = Loader(
            str(source.path),
            batch_size=job.batch_per_rank,
            num_workers=min(max(job.config.workers, 1), numba.config.NUMBA_NUM_THREADS),
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            seed=job.seed,
            pipelines={
                name: [TwoCropDecoder(job.config.image_size)] if name == "image" else None
                for name in source.fields
            },
            batches_ahead=job.config.prefetch,
        )

    def _load(self, epoch: int, batches: Iterator[np.ndarray]) -> Generator[Batch, None, None]:
        indices = np.concatenate([np.empty(0, np.int64), *batches])
        thread = _EpochThread(self._loader, self._source, self._job, epoch, indices)
        atexit.register(thread.close)
        try:
            yield from thread
        finally:
            thread.close()
            atexit.unregister(thread.close)


class TwoCropDecoder(SimpleRGBImageDecoder):
    """Decodes a JPEG, or takes raw pixels, and crops twice. Its memory, per sample of a batch:

    both views, uint8 (size, size, 3); the boxes, int64 (V, 4) as top, left, height, width, filled in before;
    a status, int32 (1,), that is not 0 where the image could not be decoded.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        view = AllocationQuery(shape, dtype)
        boxes = AllocationQuery((2, 4), np.dtype("i8"))
        status = AllocationQuery((1,), np.dtype("i4"))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), (view, view, boxes, status)

    def generate_code(self) -> Callable:
        read = self.memory_read
        decode_jpeg, crop = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        copy, samples = Compiler.compile(memcpy), Compiler.get_iterator()
        jpeg = IMAGE_MODES["jpg"]

        def decode(indices_N, memory, metadata, storage_state):
            view_a, view_b, boxes, status = memory
            for n in samples(len(indices_N)):
                field = metadata[indices_N[n]]
                stored = read(field["data_ptr"], storage_state)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                image = np.empty((height, width, 3), np.uint8)
                status[n, 0] = 0
                if field["mode"] == jpeg:
                    status[n, 0] = decode_jpeg(
                        stored, image, height, width, height, width, 0, 0, 1, 1, False, False
                    )
                else:  # raw: `BetonSource` has checked that it has the image's size
                    copy(stored, image)
                top, left, h, w = boxes[n, 0]
                crop(image, top, top + h, left, left + w, view_a[n])
                top, left, h, w = boxes[n, 1]
                crop(image, top, top + h, left, left + w, view_b[n])
            return view_a[: len(indices_N)]

        decode.is_parallel = True
        return decode


class _EpochThread(EpochIterator):
    """FFCV's thread for one epoch, with three differences from the stock one:

    it fills in each batch's crop boxes before the compiled stage runs; an exception reaches the consumer
    (the stock thread dies silently and the consumer waits for ever); `close` ends and joins the thread.

    What it queues are copies, so that a batch stays valid when its slot of the memory is used again.
    """

    def __init__(
        self, loader: Loader, source: BetonSource, job: LoaderJob, epoch: int, indices: np.ndarray
    ) -> None:
        self._source, self._job, self._epoch = source, job, epoch
        self._is_cuda = job.device.type == "cuda"
        self._stream = torch.cuda.Stream(job.device) if self._is_cuda else None
        self._copied = [None] * (loader.batches_ahead + 2)  # per slot: the event of the copy out of it
        super().__init__(loader, indices)  # starts the thread

    def run(self) -> None:
        try:
            if self._is_cuda:
                torch.cuda.set_device(self._job.device)
            numba.set_num_threads(self.loader.num_workers)
            for step, indices_N in enumerate(self.iter_ixes):
                self._put(self._load(step, indices_N))
                if self.terminate_event.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def __next__(self) -> Batch:
        item = self.output_queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._job.device)
            stream.wait_event(copied)
            for tensor in (batch.views_VNHWC, batch.labels_N, batch.indices_N, *vars(batch.params).values()):
                tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        self.terminate_event.set()
        if threading.current_thread() is not self:
            self.join()
        if self._stream is not None:
            self._stream.synchronize()  # it may still copy out of the memory that goes with this thread
        super().close()

    def __del__(self) -> None:
        """The stock one closes here; ours has been closed by its owner, or has not been started."""

    def _put(self, item: object) -> None:
        while not self.terminate_event.is_set():
            try:
                return self.output_queue.put(item, timeout=POLL_S)
            except Full:
                pass

    def _load(self, step: int, indices_N: np.ndarray) -> tuple[Batch, torch.cuda.Event | None]:
        slot = step % len(self._copied)
        if self._copied[slot] is not None:
            self._copied[slot].synchronize()
        params = self._job.draw(self._epoch, indices_N, *self._source.sizes(indices_N))
        (memory,) = (m for m in self.memory_allocations["operation"].values() if m is not None)
        view_a, view_b, boxes, status = (buffer[slot] for buffer in memory)
        boxes[:] = params.box_VN4.permute(1, 0, 2).numpy()
        self.run_pipeline(step, indices_N, slot, None)
        for n in np.flatnonzero(status):
            self._decode_again(indices_N[n], boxes[n], view_a[n], view_b[n])
        return self._copy(slot, view_a, view_b, params, indices_N)

    def _decode_again(self, index: int, boxes: np.ndarray, *views: np.ndarray) -> None:
        """libjpeg-turbo refuses CMYK and reports mere warnings as failures: what PIL can read is good."""
        image = np.ascontiguousarray(read_image(self._source, index))
        for (top, left, h, w), view in zip(boxes, views, strict=True):
            resize_crop(image, top, top + h, left, left + w, view)

    def _copy(
        self, slot: int, view_a: np.ndarray, view_b: np.ndarray, params: ViewParams, indices_N: np.ndarray
    ) -> tuple[Batch, torch.cuda.Event | None]:
        """The batch on its device, and the event after which it is there."""
        labels_N, indices_N = torch.from_numpy(self._source.labels_N[indices_N]), torch.from_numpy(indices_N)
        if not self._is_cuda:
            return Batch(torch.from_numpy(np.stack((view_a, view_b))), params, labels_N, indices_N), None
        device = self._job.device
        with torch.cuda.stream(self._stream):
            views_VNHWC = torch.empty((2, *view_a.shape), dtype=torch.uint8, device=device)
            for view, pixels in zip(views_VNHWC, (view_a, view_b), strict=True):
                view.copy_(torch.from_numpy(pixels), non_blocking=True)  # from pinned memory
            sent = (to_device(data, device) for data in (params, labels_N, indices_N))
            batch = Batch(views_VNHWC, *sent)
            self._copied[slot] = torch.cuda.Event()
            self._copied[slot].record()
        return batch, self._copied[slot]
