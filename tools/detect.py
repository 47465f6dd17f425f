"""A detection run: what `eval.detection` does, with a checkpoint to go on from, on any number of ranks."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.detection.config import FREE_KEYS, DetectionConfig
from eval.detection.finetune import Finetuning
from eval.detection.reports import OnReport
from eval.detection.run import OPEN, evaluate, prepare
from model.weights import differences, read_weights
from tools.results import file_hash, result_record, write_record
from train.checkpoint import CheckpointWriter, load_last_good, set_aside
from train.distributed import World, process_group
from train.errors import TrainingError
from train.files import preparing
from train.preemption import stop_signals_noted


@dataclass(frozen=True)
class DetectionJob:
    """What a run is made of; fit for pickling."""

    protocol: Literal["voc", "coco"]
    checkpoint: Path  # of the backbone
    root: Path  # of the dataset
    config: DetectionConfig
    device: Literal["auto", "cpu", "cuda"]
    out: Path  # the result; the detector lies beside it

    @property
    def detector(self) -> Path:
        """The run's own checkpoint."""
        return self.out.with_suffix(".pt")


@dataclass(frozen=True)
class Stopped:
    """A run that a signal has ended; what it had done is saved."""

    by: str
    iteration: int


def run_detection(job: DetectionJob, on_report: OnReport | None = None) -> dict[str, Any] | Stopped:
    """Fine-tune and test, as one rank of a run; gives the record of the result, which is in `job.out`, too.

    Goes on from the run's checkpoint, if there is one. Raises `DataError`, `ModelError` or `TrainingError`.
    """
    with stop_signals_noted() as stop, process_group(job.device) as world:
        weights = read_weights(job.checkpoint)
        train, test = OPEN[job.protocol](job.root)
        finetuning = prepare(job.protocol, weights, train, job.config, world.device)
        identity = {
            **job.config.model_dump(mode="json"),
            "protocol": job.protocol,
            "checkpoint_sha256": file_hash(job.checkpoint),
            "processes": world.size,
        }
        if world.is_main:
            with preparing(job.out.parent):
                job.out.parent.mkdir(parents=True, exist_ok=True)
        _resume(finetuning, identity, job.detector, world)
        writer = CheckpointWriter(job.detector, job.config.save_every_minutes)

        def save(is_last: bool) -> None:
            if world.is_main:
                writer.write({"config": identity, **finetuning.state_dict()}, is_last=is_last)
            if is_last:  # launchers end the other ranks when one ends: none may before it is written
                world.gather(None)

        if not finetuning.run(save, lambda: writer.is_due, lambda: bool(stop.signal), on_report):
            return Stopped(signal.Signals(stop.signal or signal.SIGTERM).name, finetuning.done)
        result = evaluate(job.protocol, finetuning, test, on_report)
        record = result_record(result, job.checkpoint, weights.architecture, world.device)
        if world.is_main:
            write_record(record, job.out)
        world.gather(None)
        return record


def _resume(finetuning: Finetuning, identity: dict[str, Any], path: Path, world: World) -> None:
    """Take over the checkpoint at `path`. Raises `TrainingError` where it is of another run."""
    state, is_sound = load_last_good(path)
    if len(set(world.gather(state["step"] if state else 0))) > 1:
        raise TrainingError(
            f"The processes find different checkpoints at {path}; its folder must be one that all share."
        )
    if state:
        _check_same_run(state, finetuning, identity, path)
        finetuning.load_state_dict(state)
    if not is_sound and world.is_main:  # and all have looked at it
        set_aside(path)


def _check_same_run(
    state: dict[str, Any], finetuning: Finetuning, identity: dict[str, Any], path: Path
) -> None:
    advice = "set it back, or choose another --out for another run"
    then = state["config"]
    for key in identity.keys() - set(FREE_KEYS):
        if then.get(key) != identity[key]:
            raise TrainingError(
                f"The detector {path} was trained with {key}={then.get(key)}, but now it is {identity[key]}; "
                f"{advice}."
            )
    if state["num_samples"] != len(finetuning.images):
        raise TrainingError(
            f"The detector {path} was trained on {state['num_samples']} images, but now there are "
            f"{len(finetuning.images)}; {advice}."
        )
    shapes = {name: tuple(value.shape) for name, value in finetuning.detector.state_dict().items()}
    if found := differences(state["model"], shapes):
        raise TrainingError(f"The detector {path} does not fit ({found}); {advice}.")
