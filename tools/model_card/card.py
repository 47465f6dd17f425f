"""The facts in a model card, and the card as two files."""

import json
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from model.weights import BackboneWeights
from tools.export import Exported
from tools.model_card.lineage import RunFacts, data_lineage, previous_checkpoint, run_facts, training_summary
from tools.model_card.owner import OwnerTexts
from tools.model_card.text import card_text
from tools.results import file_hash, records_of
from train.errors import TrainingError
from train.files import write_text_atomically

FORMAT = 1
# What the paper measures (Zbontar et al. 2021, sections 3 and 4) and kNN, by protocol.
PROTOCOLS = {
    "linear": "linear classifier on frozen features",
    "semisup": "fine-tuning with 1 % and 10 % of the labels",
    "transfer-places205": "linear classifier, Places-205",
    "transfer-inat18": "linear classifier, iNaturalist 2018",
    "voc07": "linear SVMs, VOC07",
    "detect-voc": "detection, VOC07+12",
    "detect-coco": "detection and instance segmentation, COCO",
    "knn": "nearest neighbours on frozen features",
}
NEVER_EVALUATED = (
    "robustness to corruptions, other domains and adversarial images",
    "differences between groups of people, places or languages",
    "what the network gives away of single training images",
)
_WORDNET_ID = re.compile(r"n\d{8}")


def write_card(exported: Exported, owner: OwnerTexts) -> tuple[Path, Path]:
    """Write the card beside the exported file; returns the paths of text and JSON.

    Raises `TrainingError` where they cannot be written; the exported file stays.
    """
    text, facts = exported.path.with_suffix(".card.md"), exported.path.with_suffix(".card.json")
    card = card_facts(exported, owner, _earlier_card(facts))
    try:
        write_text_atomically(facts, json.dumps(card, indent=1) + "\n")
        write_text_atomically(text, card_text(card))
    except OSError as error:
        raise TrainingError(
            f"{exported.path} is written, but its model card {text} is not: {error.strerror}; make room and "
            f"export again."
        ) from error
    return text, facts


def card_facts(exported: Exported, owner: OwnerTexts, earlier: dict[str, Any]) -> dict[str, Any]:
    """The content of the JSON file; `earlier` is that of the card which it replaces."""
    run = run_facts(exported.weights.content)
    records = records_of(exported.checkpoint)
    records = [r for r in records if r["checkpoint_sha256"] == exported.checkpoint_sha256]
    data = data_lineage(run)
    return {
        "format": FORMAT,
        "name": exported.path.stem,
        "made": date.today().isoformat(),
        "versions": {"fastbarlow": _own_version(), "torch": torch.__version__},
        "model": _model_facts(exported.weights.backbone),
        "files": [*_other_files(exported, earlier), _file_facts(exported)],
        "checkpoint": _checkpoint_facts(exported, run),
        "settings": None if run is None else run.config.model_dump(mode="json"),
        "data": data | {"is_imagenet": _is_imagenet(data, owner)},
        "training": training_summary(exported.checkpoint, run),
        "evaluations": records,
        "not_evaluated": {
            "protocols": {
                name: title
                for name, title in PROTOCOLS.items()
                if name not in {record.get("protocol") for record in records}
            },
            "properties": list(NEVER_EVALUATED),
        },
        "owner": owner.model_dump(mode="json"),
        "previous_checkpoint": previous_checkpoint(exported.checkpoint),
        "replaced": _replaced(exported, earlier),
    }


def _model_facts(weights: BackboneWeights) -> dict[str, Any]:
    backbone = weights.build()
    return {
        "backbone": weights.name,
        "small_stem": weights.small_stem,
        "feature_dim": backbone.feature_dim,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "mean": list(weights.normalisation.mean),
        "std": list(weights.normalisation.std),
    }


def _file_facts(exported: Exported) -> dict[str, Any]:
    return {
        "file": exported.path.name,
        "format": exported.format,
        "sha256": exported.sha256,
        "bytes": exported.bytes,
        "projector": exported.weights.widths,
        "difference": exported.difference,
        "reader": exported.reader,
    }


def _checkpoint_facts(exported: Exported, run: RunFacts | None) -> dict[str, Any]:
    facts = {"path": str(exported.checkpoint), "sha256": exported.checkpoint_sha256}
    if run is None:
        return facts | {"step": None, "total_steps": None, "epochs": None}
    epochs = run.step / run.steps_per_epoch
    return facts | {"step": run.step, "total_steps": run.total_steps, "epochs": epochs}


def _is_imagenet(data: dict[str, Any], owner: OwnerTexts) -> bool:
    """By the names of its classes, which are WordNet's, or by what the owner says."""
    classes = data.get("classes") or []
    named = bool(classes) and all(_WORDNET_ID.fullmatch(name) for name in classes)
    return named or any("imagenet" in name.lower() for name in owner.datasets)


def _earlier_card(path: Path) -> dict[str, Any]:
    """The facts in the card at `path`; empty where there is none that this version has written."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        texts = [card["checkpoint"]["path"], card["checkpoint"]["sha256"]]
        texts += [facts[key] for facts in card["files"] for key in ("file", "sha256")]
        return card if card["format"] == FORMAT and all(isinstance(text, str) for text in texts) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _other_files(exported: Exported, earlier: dict[str, Any]) -> list[dict[str, Any]]:
    """Files of the same stem that the earlier card names, if they are still there and of this checkpoint."""
    if not earlier or earlier["checkpoint"]["sha256"] != exported.checkpoint_sha256:
        return []
    folder = exported.path.parent
    others = [facts for facts in earlier["files"] if facts["file"] != exported.path.name]
    return [facts for facts in others if _hash_of(folder / Path(facts["file"]).name) == facts["sha256"]]


def _replaced(exported: Exported, earlier: dict[str, Any]) -> dict[str, Any] | None:
    """What had this file's name before, of another checkpoint."""
    if not earlier:
        return None
    if earlier["checkpoint"]["sha256"] == exported.checkpoint_sha256:
        return earlier.get("replaced")
    return {"made": earlier.get("made"), "checkpoint": earlier["checkpoint"], "files": earlier["files"]}


def _hash_of(path: Path) -> str | None:
    try:
        return file_hash(path)
    except OSError:
        return None


def _own_version() -> str:
    try:
        return version("fastbarlow")
    except PackageNotFoundError:
        return "unknown (not installed)"
