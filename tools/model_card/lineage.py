"""Where a checkpoint comes from: the settings in it, and what lies beside it and beside its dataset.

Nothing is taken over from a file that is not known to belong to the checkpoint; each function says why not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from pipelines.errors import DataError
from tools.convert.manifest import load_manifest, manifest_path
from tools.results import file_hash
from train.checkpoint import PREVIOUS, check_resumable
from train.config import RunConfig, load_config
from train.errors import ConfigError, TrainingError
from train.loop import CONFIG_NAME
from train.metrics import METRICS_NAME, read_metrics

CURVE_POINTS = 20
# Of a report, what says how far the objective has come.
_LAST = "step", "epoch", "loss", "invariance", "redundancy", "diagonal_error", "off_diagonal", "embedding_std"


@dataclass(frozen=True)
class RunFacts:
    """What a checkpoint says about the run that wrote it."""

    config: RunConfig
    step: int  # global steps done
    num_samples: int  # of the dataset

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.num_samples // self.config.train.batch_size)

    @property
    def total_steps(self) -> int:
        steps = self.config.train.epochs * self.steps_per_epoch
        return min(steps, self.config.train.max_steps or steps)


def run_facts(content: Mapping[str, Any]) -> RunFacts | None:
    """Of what a file holds; None where it is no checkpoint of ours, or its settings are another version's."""
    step, num_samples = content.get("step"), content.get("num_samples")
    if not isinstance(step, int) or not isinstance(num_samples, int) or "config" not in content:
        return None
    try:
        return RunFacts(RunConfig.model_validate(content["config"]), step, num_samples)
    except ValidationError:
        return None


def data_lineage(run: RunFacts | None) -> dict[str, Any]:
    """The dataset that the run was trained on; `why_unknown` where its manifest does not say more."""
    if run is None:
        return {"why_unknown": "the file does not say what it was trained on"}
    path = run.config.data.path
    facts: dict[str, Any] = {"path": str(path), "images": run.num_samples}
    if run.config.data.loader == "synthetic":
        return facts | {"why_unknown": "the loader was synthetic: random pixels, no images"}
    if not manifest_path(path).is_file():
        return facts | {"why_unknown": "no manifest lies with it: it was moved, or never converted"}
    try:
        manifest = load_manifest(path)
    except DataError as error:
        return facts | {"why_unknown": str(error)}
    if manifest.images != run.num_samples:
        reason = f"{manifest_path(path)} is now that of another dataset, of {manifest.images} images"
        return facts | {"why_unknown": reason}
    per_class = list(manifest.images_per_class.values())
    return facts | {
        "sha256": manifest.sha256,
        "source": manifest.source,
        "source_kind": manifest.source_kind,
        "source_fingerprint": manifest.source_fingerprint,
        "converted": manifest.created.date().isoformat(),
        "settings": manifest.settings.model_dump(mode="json"),
        "sizes": manifest.sizes.model_dump(mode="json", exclude={"longer_side"}),
        "left_out": len(manifest.left_out),
        "labelled": not manifest.unlabelled,
        "classes": list(manifest.classes),
        "images_per_class": [min(per_class), max(per_class)] if per_class else None,
    }


def training_summary(checkpoint: Path, run: RunFacts | None) -> dict[str, Any]:
    """Of the reports up to the checkpoint's step; `why_unknown` where there are none of this very run."""
    if run is None:
        return {"why_unknown": "the file does not say which run wrote it"}
    folder = checkpoint.parent
    try:
        beside = load_config(folder / CONFIG_NAME)
        state = {"config": run.config.model_dump(mode="json"), "num_samples": run.num_samples}
        check_resumable(state, beside, run.num_samples, checkpoint)
        records = read_metrics(folder)
    except (ConfigError, OSError):
        return {"why_unknown": f"no readable {CONFIG_NAME} and {METRICS_NAME} lie beside the checkpoint"}
    except TrainingError:
        return {"why_unknown": f"the {CONFIG_NAME} beside the checkpoint is another run's"}
    records = [r for r in records if isinstance(r.get("step"), int) and r["step"] <= run.step]
    if not records:
        return {"why_unknown": f"{METRICS_NAME} has no report up to the checkpoint's step {run.step}"}
    starts = _starts(records)
    return {
        "log": str(folder / METRICS_NAME),
        "log_sha256": file_hash(folder / METRICS_NAME),
        "reports": len(records),
        "starts": len(starts),
        "last": {name: records[-1][name] for name in _LAST if name in records[-1]},
        "pairs_per_second": _middle(records, "pairs_per_second"),
        "hours": sum(part[-1].get("seconds", 0) for part in starts) / 3600,
        "skipped_steps": sum(part[-1].get("skipped_steps", 0) for part in starts),
        "bad_samples": sum(part[-1].get("bad_samples", 0) for part in starts),
        "mfu": _middle(records, "mfu"),
        "memory_gib": max((r["memory_gib"] for r in records if "memory_gib" in r), default=None),
        "probe_accuracy": _curve(records, "probe_accuracy"),
        "knn_accuracy": _curve(records, "knn_accuracy"),
    }


def previous_checkpoint(checkpoint: Path) -> dict[str, str] | None:
    """Path and SHA-256 of the one that the run wrote before this one, if it is there."""
    path = checkpoint.with_name(f"{checkpoint.stem}.{PREVIOUS}{checkpoint.suffix}")
    try:
        return {"path": str(path), "sha256": file_hash(path)}
    except OSError:
        return None


def _starts(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The records of each process of a run that was resumed: its time counts from zero again."""
    parts = [[records[0]]]
    for before, record in pairwise(records):
        if record.get("seconds", 0) < before.get("seconds", 0):
            parts.append([])
        parts[-1].append(record)
    return parts


def _middle(records: list[dict[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if name in record]
    return median(values) if values else None


def _curve(records: list[dict[str, Any]], name: str) -> list[list[float]]:
    """[step, share] of at most `CURVE_POINTS` reports, evenly spread, the last one among them."""
    points = [[record["step"], record[name]] for record in records if name in record]
    every = max(1, -(-len(points) // CURVE_POINTS))
    return points[::-1][::every][::-1]
