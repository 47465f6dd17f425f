"""What a run says about itself: `StepReport`, written as JSON lines, to TensorBoard and W&B by rank 0."""

import json
import logging
import math
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import TrainingError
from train.files import write_text_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_NAME = "metrics.jsonl"
WANDB_NAME = "wandb-run-id.txt"
_log = logging.getLogger(__name__)
_NOT_DRAWN = {"step", "total_steps", "seconds_left"}  # a curve of these would say nothing


@dataclass(frozen=True)
class StepReport:
    """The state of a run after `step` steps; rates and shares are over the steps since the last report.

    What a run cannot know is None, and absent from its records, as is what is not finite.
    """

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
    pairs_per_second_per_gpu: float | None = None
    phase_ms: Mapping[str, float] = field(default_factory=dict)  # of this step alone, on rank 0
    exposed_communication_ms: float | None = None  # of one step: the part of the exchange of gradients during
    # which the backward pass had nothing left to compute; only with several ranks
    mfu: float | None = None  # operations of the network, as a share of the GPUs' published peak
    memory_gib: float | None = None  # largest that tensors have taken on rank 0's GPU
    gradient_scale: float | None = None  # only in fp16
    probe_accuracy: float | None = None  # of the linear probe, on samples before it learnt from them, 0 to 1
    knn_accuracy: float | None = None  # of the network after this step, 0 to 1
    largest_loss: float | None = None  # of the steps since the last report
    skipped_steps: int = 0  # whose gradients were not finite, since this process began to train
    diagonal_error: float | None = None  # root mean square of 1 - C_ii; 0 where the views agree
    off_diagonal: float | None = None  # root mean square of C_ij, i != j; 0 where all features differ
    embedding_std: float | None = None  # of a feature over rank 0's samples, mean of all features
    dead_features: float | None = None  # share of the features whose variance is below the loss's epsilon

    def record(self) -> dict[str, float]:
        """What is known, as plain numbers; those of `phase_ms` under names such as `loss_ms`."""
        known = {name: value for name, value in vars(self).items() if name != "phase_ms"}
        known |= {f"{phase}_ms": ms for phase, ms in self.phase_ms.items()}
        return {name: x for name, x in known.items() if x is not None and math.isfinite(x)}


class MetricsWriter:
    """Appends reports to `metrics.jsonl` and `tensorboard/` in the run directory, and to a project of W&B.

    Records of steps after `start_step` are dropped first: a killed run had done these steps but not saved
    them, and the resumed run does them again. W&B goes on with the run whose name the run directory holds.
    `settings` are shown there. What cannot be written later, as on a full disk, is lost with a warning.

    Raises `OSError` where the files cannot be made, and `TrainingError` where W&B is not installed or refuses
    the run.
    """

    def __init__(
        self, run_dir: Path, start_step: int, wandb: str | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        self._run_dir = run_dir
        self._wandb = None if wandb is None else _open_wandb(wandb, run_dir, settings or {})
        path = run_dir / METRICS_NAME
        kept = [r for r in read_metrics(run_dir) if r["step"] <= start_step] if path.exists() else []
        write_text_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._has_lost = False
        self._board: SummaryWriter | None = None
        self._open_board(start_step)

    def write(self, report: StepReport) -> None:
        record = report.record()
        with self._losses_told():
            # After a failure half a line may be there.
            line = ("\n" if self._has_lost else "") + json.dumps(record) + "\n"
            with (self._run_dir / METRICS_NAME).open("a", encoding="utf-8") as file:
                file.write(line)
            if self._board is None:
                self._open_board(report.step - 1)
            for name in record.keys() - _NOT_DRAWN:
                self._board.add_scalar(name, record[name], report.step)
            self._has_lost = False
        self._tell_wandb("log", record, step=report.step)

    def close(self) -> None:
        self._tell_wandb("finish")
        if self._board is not None:
            with self._losses_told():
                self._board.close()

    def _tell_wandb(self, method: str, *arguments: Any, **options: Any) -> None:
        """A failure is a warning and the last word: W&B's process has ended, or cannot write either."""
        if self._wandb is None:
            return
        try:
            getattr(self._wandb, method)(*arguments, **options)
        except Exception as error:  # it has errors of its own, those of its sockets and others
            self._wandb = None
            reason = (str(error) or type(error).__name__).splitlines()[0]
            _log.warning("W&B takes no more reports (%s); training goes on without it.", reason)

    def _open_board(self, start_step: int) -> None:
        _be_quiet_about_full_disks()
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=start_step + 1)

    @contextmanager
    def _losses_told(self) -> Iterator[None]:
        """A failure to write is a warning, the first of several in a row."""
        try:
            yield
        except OSError as error:
            self._board = None  # its thread has ended
            if not self._has_lost:
                _log.warning(
                    "Cannot write the metrics to %s: %s; training goes on without them until there is room.",
                    self._run_dir,
                    error.strerror or error,
                )
            self._has_lost = True


@cache
def _be_quiet_about_full_disks() -> None:
    """TensorBoard's thread reports a failure to write to the next call, and with a traceback besides."""
    report = threading.excepthook

    def report_others(args: threading.ExceptHookArgs) -> None:
        if not (
            issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard")
        ):
            report(args)

    threading.excepthook = report_others


def _open_wandb(project: str, run_dir: Path, settings: dict[str, Any]) -> Any:
    """The run of W&B that belongs to the run directory. Raises `OSError` and `TrainingError`."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise TrainingError(
            "train.wandb needs the Python package 'wandb'; install it, or set train.wandb to null."
        ) from error
    name = run_dir / WANDB_NAME
    if not name.exists():
        write_text_atomically(name, secrets.token_hex(8))
    run_id = name.read_text(encoding="utf-8").strip()
    try:
        return wandb.init(
            project=project, id=run_id, name=run_dir.name, dir=str(run_dir), config=settings, resume="allow"
        )
    except wandb.Error as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"W&B refuses the run ({reason}); log in with `wandb login`, set WANDB_MODE=offline, or set "
            f"train.wandb to null."
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
