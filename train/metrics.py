"""What a run says about itself: `StepReport`, written as JSON lines and to TensorBoard by rank 0."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from train.errors import TrainingError

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class StepReport:
    """The state of a run after `step` steps; rates and shares are over the steps since the last report."""

    step: int  # global steps done
    total_steps: int
    epoch: int  # of the last step, counted from 0
    loss: float
    invariance: float
    redundancy: float
    lr_weights: float
    lr_biases: float
    pairs_per_second: float  # over all ranks
    data_wait_share: float  # share of the wall time that the host waited for the loader, 0 to 1
    bad_samples: int  # images that rank 0 could not read so far, since this process began to train
    seconds: float  # wall time since this process began to train
    seconds_left: float


class MetricsWriter:
    """Appends reports to `metrics.jsonl` and `tensorboard/` in the run directory.

    Records of steps after `start_step` are dropped first: a killed run had done these steps but not saved
    them, and the resumed run does them again. Raises `OSError` at first and `TrainingError` in `write` and
    `close`, where the disk is full.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run_dir = run_dir
        path = run_dir / METRICS_NAME
        kept = [r for r in read_metrics(run_dir) if r["step"] <= start_step] if path.exists() else []
        beside = path.with_name(f"{METRICS_NAME}.tmp")
        beside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        beside.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def write(self, report: StepReport) -> None:
        record = asdict(report)
        with self._advice():
            self._file.write(json.dumps(record) + "\n")
            for name in set(record) - {"step", "total_steps", "seconds_left"}:
                self._board.add_scalar(name, record[name], report.step)

    def close(self) -> None:
        with self._advice(), closing(self._board):
            self._file.close()

    @contextmanager
    def _advice(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"Cannot write the metrics to {self._run_dir}: {error.strerror or error}; make room and "
                f"start again, and the run goes on from the last checkpoint."
            ) from error


def read_metrics(run_dir: Path) -> list[dict]:
    """The records of a run's `metrics.jsonl`, without lines that a crash or a full disk left damaged."""
    records = []
    for line in (run_dir / METRICS_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):  # half a line may be a number
            records.append(record)
    return records
