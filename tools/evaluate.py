"""An evaluation as a job of one rank or several, which goes on after a stop and writes its result."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import EvalConfig
from eval.run import evaluate, settings_of
from eval.subset import draw_subset, read_subset, subset_list
from model.weights import read_weights
from pipelines.source import Source, Voc07Source, open_source
from tools.results import check_place, file_hash, result_record, write_record
from tools.work_folder import WorkFolder
from train.distributed import World, process_group
from train.files import write_text_atomically
from train.preemption import stop_signals_noted

OnProgress = Callable[[tuple[int, int]], None]  # images done, images in all


@dataclass(frozen=True)
class EvalJob:
    """What is evaluated and how; fit for pickling."""

    protocol: str  # a key of `eval.run.PROTOCOLS`
    checkpoint: Path
    train: Path
    test: Path
    config: EvalConfig
    device: str
    out: Path
    work: Path | None = None  # None: beside `out`
    percent: float | None = None  # of the training images, drawn, or
    subset: Path | None = None  # those in this list

    @property
    def list_path(self) -> Path:
        """Of the images that are learnt from where `percent` is given."""
        return self.out.with_suffix(".txt")


def run_job(job: EvalJob, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Evaluate as one rank of a process group, which torchrun's environment names; gives the result's record.

    1. see that the result can be written
    2. which training images to learn from
    3. evaluate, from what an earlier call has kept
    4. write the result, on rank 0, and remove what was kept

    Raises `DataError`, `ModelError` or `TrainingError`; after SIGTERM or SIGUSR1 some rank `StoppedError`.
    """
    with stop_signals_noted() as stop, process_group(job.device) as world:
        if world.is_main:
            check_place(job.out)  # 1
        weights = read_weights(job.checkpoint)
        train, test = open_source(job.train), open_source(job.test)
        subset_K = _subset(job, train, world)  # 2
        folder = (job.work or job.out.with_suffix(".work")) / _key(job, world, train, test, subset_K)
        keeper = WorkFolder(folder, stop)

        result = evaluate(  # 3
            job.protocol,
            weights.build(),
            train,
            test,
            job.config,
            world.device,
            None if on_progress is None else lambda done, total: on_progress((done, total)),
            normalisation=weights.normalisation,
            keeper=keeper,
            subset_K=subset_K,
        )
        record = result_record(result, job.checkpoint, weights.architecture, world.device)
        if subset_K is not None:
            record["settings"]["subset"] = str(job.subset or job.list_path)
        if world.is_main:
            write_record(record, job.out)  # 4
        world.gather(None)  # launchers end the other ranks when one ends
        keeper.remove()
    return record


def _subset(job: EvalJob, train: Source, world: World) -> np.ndarray | None:
    """The samples to learn from; those that are drawn are written to a list."""
    if job.subset is not None:
        return read_subset(job.subset, train)
    if job.percent is None:
        return None
    drawn_K = draw_subset(train, job.percent, job.config.semisup.seed)
    if world.is_main:
        write_text_atomically(job.list_path, subset_list(train, drawn_K))
    return drawn_K


def _key(job: EvalJob, world: World, train: Source, test: Source, subset_K: np.ndarray | None) -> str:
    """Tells this evaluation from others: by checkpoint, settings, kind of device and data."""
    settings = settings_of(job.protocol, job.config)
    del settings["features"]["workers"]
    facts = {
        "checkpoint": file_hash(job.checkpoint),
        "protocol": job.protocol,
        "settings": settings,
        "device": world.device.type,
        "data": [_identity(train), _identity(test)],
        "subset": None if subset_K is None else _digest(subset_K),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _identity(source: Source) -> dict[str, Any]:
    path = Path(source.path)
    changed = path.stat().st_mtime_ns if path.is_file() else None
    classes = _digest(np.array(source.classes))
    labels = source.presence_NC if isinstance(source, Voc07Source) else source.labels_N
    return {"path": str(path), "changed": changed, "classes": classes, "labels": _digest(labels)}


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
