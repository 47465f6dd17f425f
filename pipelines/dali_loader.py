"""NVIDIA DALI: decodes on the GPU where there is one and on CPU threads otherwise, from one graph.

Shape legend: V views (2), N samples.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from pipelines.batch import NUM_VIEWS, Batch, ViewParams, to_device
from pipelines.errors import DataError
from pipelines.loaders import EpochLoader, LoaderJob
from pipelines.source import BetonSource, Source, open_source, read_image

Feed = Callable[[], tuple[list[np.ndarray], ...]]


def build_pipeline(
    feed: Feed,
    *,
    batch_size: int,
    image_size: int,
    device: Literal["cpu", "gpu"],
    device_id: int | None,
    num_threads: int,
    prefetch: int,
) -> Pipeline:
    """The graph: one decode, then one crop and bicubic resize per view; both views come out as uint8 HWC.

    Each call of `feed` gives one batch: the encoded images, then start and end (row, column; int32) of
    the first view's boxes, then of the second's. It raises `StopIteration` at the end of an epoch.
    """
    pipeline = Pipeline(batch_size, num_threads, device_id, prefetch_queue_depth=prefetch)
    with pipeline:
        encoded, *corners = fn.external_source(
            source=feed,
            num_outputs=1 + 2 * NUM_VIEWS,
            dtype=[types.UINT8] + [types.INT32] * (2 * NUM_VIEWS),
            ndim=1,
        )
        images = fn.decoders.image(
            encoded,
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as on the CPU
        )
        views = [
            fn.resize(
                # Sliced first: with roi_start and roi_end the filter reads pixels outside the box, PIL's not.
                fn.slice(images, start=start, end=end, axes=[0, 1]),
                size=[image_size, image_size],
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            for start, end in zip(corners[::2], corners[1::2], strict=True)
        ]
        pipeline.set_outputs(*views)
    return pipeline


class DaliLoader(EpochLoader):
    """Reads every kind of source, but for raw pixels."""

    def __init__(self, job: LoaderJob) -> None:
        self._source = open_source(job.config.path)
        if isinstance(self._source, BetonSource) and self._source.holds_raw:
            raise DataError(
                f"The loader 'dali' reads JPEG files, and {self._source.path} holds raw pixels; "
                "set data.loader to ffcv or folder, or convert the images again with --storage jpg."
            )
        super().__init__(job, len(self._source))
        self._feed = _Feed(self._source)
        self._pipeline: Pipeline | None = None

    def close(self) -> None:
        super().close()
        self._pipeline = None

    def _load(self, epoch: int, batches: Iterator[np.ndarray]) -> Generator[Batch, None, None]:
        job, feed, remaining = self._job, self._feed, list(batches)
        if not remaining:
            return
        # An epoch that does not reach its end leaves batches in the pipeline, or the pipeline broken: such a
        # pipeline is not used again.
        pipeline, self._pipeline = self._pipeline or self._build(), None
        feed.start(
            (indices_N, job.draw(epoch, indices_N, *self._source.sizes(indices_N))) for indices_N in remaining
        )
        for step in range(len(remaining)):
            stream = torch.cuda.current_stream(job.device) if job.device.type == "cuda" else None
            try:
                outputs = pipeline.run(stream)
            except RuntimeError as error:
                raise self._explain(error) from error
            indices_N, params = feed.in_flight.popleft()
            # Stacking copies, on the same stream, so that DALI's buffers are free again after it.
            views_VNHWC = torch.stack([torch.from_dlpack(output.as_tensor()) for output in outputs])
            labels_N = torch.from_numpy(self._source.labels_N[indices_N])
            sent = (to_device(data, job.device) for data in (params, labels_N, torch.from_numpy(indices_N)))
            batch = Batch(views_VNHWC, *sent)
            if step == len(remaining) - 1:  # nobody need ask for more than the last batch
                self._finish(pipeline)
            yield batch

    def _finish(self, pipeline: Pipeline) -> None:
        """Keep a pipeline that has given all batches of its epoch for the next one."""
        with suppress(StopIteration):
            pipeline.run()  # DALI must see the end of an epoch before it can be reset
        pipeline.reset()
        self._pipeline = pipeline

    def _build(self) -> Pipeline:
        on_gpu = self._job.device.type == "cuda"
        return build_pipeline(
            self._feed,
            batch_size=self._job.batch_per_rank,
            image_size=self._job.config.image_size,
            device="gpu" if on_gpu else "cpu",
            device_id=self._job.device.index if on_gpu else None,
            num_threads=max(self._job.config.workers, 1),
            prefetch=self._job.config.prefetch,
        )

    def _explain(self, error: RuntimeError) -> DataError:
        """The sample at fault, found by decoding those in flight: DALI does not tell which batch failed."""
        try:
            for indices_N, _ in self._feed.in_flight:
                for index in indices_N:
                    read_image(self._source, index)
        except DataError as fault:
            return fault
        reason = str(error).split("encountered:")[-1].strip().splitlines()[0]
        return DataError(
            f"DALI cannot load images of {self._source.path} ({reason}); set data.loader to folder or ffcv."
        )


class _Feed:
    """Hands batches to DALI, which asks for them ahead of time, and remembers them until they come out."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.start(iter(()))

    def start(self, coming: Iterator[tuple[np.ndarray, ViewParams]]) -> None:
        self._coming = coming
        self.in_flight: deque[tuple[np.ndarray, ViewParams]] = deque()

    def __call__(self) -> tuple[list[np.ndarray], ...]:
        indices_N, params = next(self._coming)
        self.in_flight.append((indices_N, params))
        corners = []
        for box_N4 in params.box_VN4.numpy():
            corners += [box_N4[:, :2].copy(), box_N4[:, :2] + box_N4[:, 2:]]
        return [self._source.encoded(index) for index in indices_N], *corners
