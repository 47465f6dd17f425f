"""Results gathered into blocks, the steps in which a dataset grows.

Shape legend: N samples of a block.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np

from tools.convert.journal import Record
from tools.convert.pool import Prepared
from tools.convert.recorder import Recorder
from tools.convert.sources import ImageSet
from tools.convert.target import Target, cut

ENTRIES = 256  # of the source, at most
BYTES = 32 << 20  # of images, unless the last one exceeds it


def write_blocks(
    results: Iterable[Prepared],
    done: int,
    images: ImageSet,
    writer: Target,
    recorder: Recorder,
    report: Callable[[int], None],
) -> None:
    """Append the results for the entries from `done` on, in blocks whose ends depend on nothing else."""
    bounds = set(writer.bounds)
    samples, pieces, left_out, num_bytes, start = [], [], [], 0, done
    for chunk in results:
        ends = []
        for place, size in enumerate(chunk.samples_N["size"].tolist(), 1):
            num_bytes += size
            if done + place in bounds or done + place - start >= ENTRIES or num_bytes >= BYTES:
                ends.append(place)
                start, num_bytes = done + place, 0
        for part in _split(chunk, ends):
            left_out += [(images.name(done + i), why) for i, why in enumerate(part.reasons) if why]
            samples.append(part.samples_N[[why is None for why in part.reasons]])
            pieces += part.pieces
            done += len(part.reasons)
            if ends:
                ends.pop(0)
                samples_N = np.concatenate(samples)
                written = writer.append(samples_N, pieces, done in bounds)
                recorder.put(Record(done, done in bounds, samples_N, left_out), written)
                samples, pieces, left_out = [], [], []
        report(done)


def _split(chunk: Prepared, ends: list[int]) -> Iterator[Prepared]:
    """The parts of a chunk up to each of `ends`, and the rest."""
    edges = list(pairwise([0, *ends, len(chunk.reasons)]))
    parts = [chunk.samples_N[first:last] for first, last in edges]
    pieces = cut(chunk.pieces, [int(part["size"].sum(dtype=np.int64)) for part in parts])
    for (first, last), part, of_part in zip(edges, parts, pieces, strict=True):
        yield Prepared(part, chunk.reasons[first:last], of_part)
