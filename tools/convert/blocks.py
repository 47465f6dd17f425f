"""Results gathered into blocks, the steps in which a dataset grows.

Shape legend: N samples of a block.
"""

from collections.abc import Callable, Iterable

import numpy as np

from tools.convert.journal import Record
from tools.convert.pool import Result
from tools.convert.recorder import Recorder
from tools.convert.sources import ImageSet
from tools.convert.target import SAMPLE, Target

ENTRIES = 256  # of the source, at most
BYTES = 32 << 20  # of images, unless the last one exceeds it


def write_blocks(
    results: Iterable[list[Result]],
    done: int,
    images: ImageSet,
    writer: Target,
    recorder: Recorder,
    report: Callable[[int], None],
) -> None:
    """Append the results for the entries from `done` on, in blocks whose ends depend on nothing else."""
    bounds = set(writer.bounds)
    rows, encoded, left_out, num_bytes, start = [], [], [], 0, done
    for chunk in results:
        for result in chunk:
            if isinstance(result, str):
                left_out.append((images.name(done), result))
            else:
                label = images.label(done)
                size = len(result.encoded)
                rows.append((result.is_raw, result.was_copied, result.height, result.width, label, size))
                encoded.append(result.encoded)
                num_bytes += size
            done += 1
            ends_file = done in bounds
            if ends_file or done - start >= ENTRIES or num_bytes >= BYTES:
                samples_N = np.array(rows, SAMPLE)
                written = writer.append(samples_N, encoded, ends_file)
                recorder.put(Record(done, ends_file, samples_N, left_out), written)
                rows, encoded, left_out, num_bytes, start = [], [], [], 0, done
        report(done)
