"""The results of all benchmarks in one form: what was measured, its spread over the turns, and a ratio.

Each `_of_*` function reads the rows of one benchmark's result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Result = Mapping[str, Any]


class Figure(NamedTuple):
    """One line of the table. `values` are those of the turns; `ratio` is the median of the turns' ratios."""

    bench: str
    case: str
    unit: str  # "pairs/s", "ms" ...
    values: Sequence[float]
    ratio: float | None = None  # how many times as fast as `ratio_to`
    ratio_to: str = ""

    @property
    def percentiles(self) -> tuple[float, float, float]:
        """The 10th, 50th and 90th, between the values as they are: few turns say little of rare ones."""
        low, middle, high = np.percentile(self.values, (10, 50, 90)).tolist()
        return low, middle, high


def figures_of(result: Result) -> list[Figure]:
    """Of a benchmark's result, by its key "bench"."""
    return list(_READERS[result["bench"]](result))


def _of_loader(result: Result) -> Iterator[Figure]:
    shape = f"{result['image_size']} px, batches of {result['batch_size']}, {result['workers']} workers"
    for row in result["rows"]:
        case = f"{row['loader']}, {row['delivers']}, {shape}"
        values, ratio = row["all_pairs_per_second"], row["ratio_to_authors"]
        yield Figure("loader", case, "pairs/s", values, ratio, "authors")
    for row in result["stages"]:
        case = f"{row['stage']} alone on {row['device']}, {shape}"
        yield Figure("loader", case, "pairs/s", row["all_pairs_per_second"])


def _of_augment(result: Result) -> Iterator[Figure]:
    for row in result["rows"]:
        case = f"{row['implementation']}, {row['dtype']} on {row['device']}, {row['views_px']} px"
        values, ratio = row["all_pairs_per_second"], row["ratio_to_authors"]
        yield Figure("augment", f"{case}, batches of {result['batch']}", "pairs/s", values, ratio, "authors")


def _of_convert(result: Result) -> Iterator[Figure]:
    for row in result["rows"]:
        case = f"{row['writer']}, max side {row['max_side']}, {result['workers']} workers"
        rates = [result["images"] / seconds for seconds in row["all_seconds"]]
        yield Figure("convert", case, "images/s", rates, row["ratio_to_ffcv"], "FFCV's writer")


def _of_loss(result: Result) -> Iterator[Figure]:
    shapes: set[str] = set()  # of each, the authors' row comes first
    for row in result["rows"]:
        shape = f"N {row['n']}, D {row['d']}, {row['world']} ranks, {row['dtype']} on {row['device']}"
        if shape not in shapes:
            yield Figure("loss", f"authors, {shape}", "ms", row["all_ms_authors"], 1.0, "authors")
        shapes.add(shape)
        case = f"{row['algorithm']}, {row['implementation']}, {shape}"
        yield Figure("loss", case, "ms", row["all_ms"], row["speedup"], "authors")


def _of_step(result: Result) -> Iterator[Figure]:
    what = result["settings"]
    network = f"{what['backbone']}, {what['projector']}, {what['image_size']} px"
    for row in result["rows"]:
        case = f"{row['name']}, {network}, batch {row['batch_size']}, {row['precision']}"
        rates = [1000 * row["batch_size"] / ms for ms in row["all_ms_per_step"]]
        yield Figure("step", case, "pairs/s", rates, row["speedup"], "authors")


def _of_plan(result: Result) -> Iterator[Figure]:
    for row in result["rows"]:
        case = f"step, {row['ranks']} ranks on the CPU, {row['pairs_per_rank']} pairs of each, {row['loss']}"
        yield Figure("plan", case, "ms", row["all_ms"], row["ratio"], "planned")


def _of_knn(result: Result) -> Iterator[Figure]:
    k = " and ".join(map(str, result["k"]))
    case = f"{result['rows']} x {result['width']}, k {k}, {result['precision']} on {result['device']}"
    rates = [result["queries"] / seconds for seconds in result["all_seconds"]]
    yield Figure("knn", case, "queries/s", rates)


_READERS: dict[str, Callable[[Result], Iterator[Figure]]] = {
    "loader": _of_loader,
    "augment": _of_augment,
    "convert": _of_convert,
    "loss": _of_loss,
    "step": _of_step,
    "plan": _of_plan,
    "knn": _of_knn,
}
