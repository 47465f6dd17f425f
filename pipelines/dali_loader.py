"""NVIDIA DALI: decodes on the GPU where there is one and on CPU threads otherwise, from one graph.

DALI takes damaged files that PIL refuses where it meets no error on its way: some that end too early or have
wrong bytes, in particular beyond the part that both crops need. Their crops hold what it made of them.

Memory: `prefetch` + 2 batches of 2 * batch_per_rank * image_size^2 * 3 bytes on the training device; a few
batches of decoded images there; and, where the GPU decodes, what its decoders reserve for each thread.

Shape legend: V views (2), N samples of this rank's batch.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor

from pipelines.batch import Batch, ViewParams, to_device
from pipelines.dali_graph import Fed, Graph, reason
from pipelines.epoch_loader import EpochLoader, LoaderJob, Task
from pipelines.errors import DataError
from pipelines.prefetch import prefetch
from pipelines.sample_reader import SampleReader
from pipelines.source import BetonSource, Source, open_source, read_image
from pipelines.source.header import stored_size

TIFF = b"II", b"MM"  # the first bytes of files that DALI misreads where they are of the rarer kinds

_log = logging.getLogger(__name__)


class _InFlight(NamedTuple):
    """A batch that DALI works on."""

    task: Task
    indices_N: np.ndarray  # int64: the samples that are loaded for it
    params: ViewParams
    fed: Fed


class DaliLoader(EpochLoader):
    """Reads every kind of source, but for raw pixels."""

    def __init__(self, job: LoaderJob) -> None:
        source = open_source(job.config.path)
        if source.holds_raw:
            raise DataError(
                f"The loader 'dali' reads image files, and {source.path} holds raw pixels; "
                "set data.loader to ffcv or folder, or convert the images again with --storage jpg."
            )
        super().__init__(job, len(source), source)
        self._graph = _graph(job, source)
        self._reader = SampleReader(source, job, self._bad)
        self._refused: set[int] = set()  # samples that PIL can read, but not DALI
        self._has_stated_size_N = np.zeros(len(source), np.bool_)  # as far as is known

    def _stream(self, tasks: Iterator[Task]) -> Generator[Batch, None, None]:
        return prefetch(self._batches_of(tasks), 1, self._job.device)  # DALI prepares the others itself

    def _batches_of(self, tasks: Iterator[Task]) -> Generator[Batch, None, None]:
        """Of DALI's bad samples nothing is known but that a pipeline fails, all batches in flight with it.

        1. Run a pipeline until it fails, if it does.
        2. Find the samples at fault, which from now on are replaced or read by PIL.
        3. Run another pipeline, from the batches that were in flight on.
        """
        while True:
            in_flight: deque[_InFlight] = deque()
            failure = yield from self._run(tasks, in_flight)  # 1
            self._find_fault(in_flight, failure)  # 2
            tasks = chain([batch.task for batch in in_flight], tasks)  # 3

    def _run(self, tasks: Iterator[Task], in_flight: deque[_InFlight]) -> Generator[Batch, None, str]:
        """Yields batches until DALI fails, and returns why; what it still worked on then is `in_flight`."""

        def feed() -> Fed:
            in_flight.append(self._read(next(tasks)))
            return in_flight[-1].fed

        device = self._job.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        pipeline = self._graph.build(feed)
        while True:
            try:
                outputs = pipeline.run(stream)
            except RuntimeError as error:
                return reason(error)
            views_VNHWC = self._views(outputs, in_flight[0].fed).to(device)
            del outputs
            done = in_flight.popleft()
            batch = self._reader.batch(views_VNHWC, done.params, done.indices_N)
            sent = (to_device(part, device) for part in (batch.params, batch.labels_N, batch.indices_N))
            yield Batch(views_VNHWC, *sent)

    def _views(self, outputs: tuple[TensorListCPU | TensorListGPU, ...], fed: Fed) -> Tensor:
        if not self._graph.makes_views:
            return torch.from_numpy(self._graph.crop_parts(outputs[0], fed))
        # The one copy, on the stream to which the outputs are bound, so that DALI gets its memory back in
        # the right order, whichever streams use the batch.
        return torch.stack([torch.from_dlpack(view.as_tensor()) for view in outputs])

    def _read(self, task: Task) -> _InFlight:
        """Raises `DataError` where a file cannot be read and nothing may take its place."""
        while True:
            indices_N, params = self._reader.draw(task.epoch, task.indices_N)
            try:
                encoded = [self._encoded(index) for index in indices_N.tolist()]
            except DataError:
                if not self._bad.find(self._encoded, indices_N.tolist()):
                    raise
            else:
                return _InFlight(task, indices_N, params, self._graph.fed(encoded, params))

    def _encoded(self, index: int) -> np.ndarray:
        """uint8: the image file, or its pixels in a format that DALI knows where it cannot read the file.

        Raises `DataError` where PIL cannot either, or where the image is of another size than stated: DALI
        would take crops that were drawn for another image.
        """
        encoded = self._source.encoded(index)
        is_for_dali = index not in self._refused and encoded[:2].tobytes() not in TIFF
        if is_for_dali and self._is_of_stated_size(index, encoded):
            return encoded
        image = read_image(self._source, index)
        return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)

    def _is_of_stated_size(self, index: int, encoded: np.ndarray) -> bool:
        if not self._has_stated_size_N[index]:
            (height,), (width,) = self._source.sizes(np.array([index]))
            with suppress(Exception):  # whatever Pillow raises for a damaged file: it will again
                self._has_stated_size_N[index] = stored_size(encoded) == (height, width)
        return bool(self._has_stated_size_N[index])

    def _find_fault(self, in_flight: deque[_InFlight], failure: str) -> None:
        """Note the samples for which DALI fails. Raises `DataError` where nothing new is found."""
        for batch in in_flight:
            failing = {int(batch.indices_N[n]) for n in self._graph.failing(batch.fed)} - self._refused
            self._bad.find(lambda index: read_image(self._source, index), failing)
            for index in failing - self._bad.reasons.keys():
                _log.warning("DALI cannot read %s, so PIL does.", self._source.name(index))
                self._refused.add(index)
            if failing:
                return
        raise DataError(
            f"DALI cannot load images of {self._source.path} ({failure}); set data.loader to folder or ffcv."
        )


def _graph(job: LoaderJob, source: Source) -> Graph:
    """Raises `DataError` where the GPU shall decode and the training is not on one."""
    config, on_gpu = job.config, job.device.type == "cuda"
    if config.dali.device == "gpu" and not on_gpu:
        raise DataError(f"data.dali.device gpu needs a CUDA device, not {job.device}; set it to auto.")
    largest_HW = (0, 0)
    if isinstance(source, BetonSource):  # others would read every file for it
        heights_N, widths_N = source.sizes(np.arange(len(source)))
        largest = np.argmax(heights_N.astype(np.int64) * widths_N)
        largest_HW = int(heights_N[largest]), int(widths_N[largest])
    memory = config.dali.decoder_memory
    return Graph(
        batch_size=job.batch_per_rank,
        image_size=config.image_size,
        device="gpu" if on_gpu else "cpu",
        decoder="gpu" if on_gpu and config.dali.device != "cpu" else "cpu",
        device_id=job.device.index if on_gpu else None,
        num_threads=max(config.workers, 1),
        prefetch=config.prefetch,
        distorts=config.augment.implementation == "dali",
        hardware_share=config.dali.hardware_decoder_share,
        reserved=None if memory is None else memory << 20,
        largest_HW=largest_HW,
    )
