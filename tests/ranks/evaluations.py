"""One rank of the multi-process test of the evaluations: images in; features, figures and weights out."""

import signal
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch

import eval.features
from eval.classifier import KEPT
from eval.features import extract_features
from eval.linear_fast import linear_fast
from pipelines.source import FolderSource
from tests.evaluations import (
    RANK_SETTINGS,
    RANK_SUBSETS,
    TRAINED,
    MemoryKeeper,
    Pixels,
    measure_voc07,
    task_of,
)
from tools.evaluate import EvalJob, OnProgress, run_job
from train.distributed import process_group


def measure(folder: Path) -> dict:
    """Everything that one rank should find as well as several."""
    sources = FolderSource(folder / "train"), FolderSource(folder / "test")
    eval.features.BLOCK_IMAGES = 4
    task = task_of(*sources, RANK_SETTINGS)
    found = {"features": extract_features(task.backbone, sources[0], task.config.features, "cpu")}
    for name, protocol in TRAINED.items():
        keeper = MemoryKeeper()
        figures = protocol(task_of(*sources, RANK_SETTINGS, subset_K=RANK_SUBSETS.get(name), keeper=keeper))
        found[name] = figures, keeper.kept.get(KEPT)
    found["linear-fast"] = asdict(linear_fast(task))
    found["voc07"] = measure_voc07(folder / "VOCdevkit", Pixels())
    return found


def rank(folder: Path, job: EvalJob, on_report: OnProgress | None) -> set[signal.Signals]:
    """Write what this rank measures, do the job, and give the signals that wait until somebody notes them."""
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with process_group("cpu") as world:
        torch.save(measure(folder), folder / f"{world.rank}.pt")
        # Ranks can meet once: a second group would find the addresses of the first.
        with patch("tools.evaluate.process_group", lambda device: nullcontext(world)):
            run_job(job, on_report)
    return waiting
