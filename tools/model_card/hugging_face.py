"""The block of YAML at the head of a card, as Hugging Face's specification of model cards has it."""

import re
from typing import Any

# Names of licences that Hugging Face knows; others are named under `license_name`.
LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "gpl-3.0", "lgpl-3.0"),
    *("agpl-3.0", "mpl-2.0", "openrail", "unlicense", "unknown"),
)
_METRICS = {"top1": "accuracy", "top5": "accuracy", "mAP": "mean_average_precision"}


def front_matter(card: dict[str, Any]) -> dict[str, Any]:
    """`model-index` is there where there are results; `datasets` are those that the owner has named."""
    licence = (card["owner"]["licence"] or "unknown").lower()
    results = [_result(record) for record in card["evaluations"]]
    metrics = [metric["type"] for result in results for metric in result["metrics"]]
    matter: dict[str, Any] = {"license": licence}
    if licence not in LICENCES:
        matter = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence).strip("-")}
    trained_here = ["barlow-twins", "self-supervised-learning"] if card["settings"] else []
    matter |= {
        "library_name": "fastbarlow",
        "pipeline_tag": "image-feature-extraction",
        "tags": [*trained_here, card["model"]["backbone"]],
        "datasets": list(card["owner"]["datasets"]),
        "metrics": list(dict.fromkeys(metrics)),
    }
    return matter | ({"model-index": [{"name": card["name"], "results": results}]} if results else {})


def _result(record: dict[str, Any]) -> dict[str, Any]:
    """Of one evaluation. Values are shares of 1."""
    protocol, test = record["protocol"], record["data"].get("test", {})
    name = str(test.get("path", "")).rpartition("/")[2] or "unknown"
    is_detection = protocol.startswith("detect")
    return {
        "task": {"type": "object-detection" if is_detection else "image-classification", "name": protocol},
        "dataset": {
            "type": re.sub(r"[^A-Za-z0-9_.-]+", "-", name),
            "name": name,
            "args": {key: test[key] for key in ("images", "classes") if key in test},
        },
        "metrics": [
            {"type": _METRICS.get(figure, figure.lower()), "name": f"{protocol} {figure}", "value": value}
            for figure, value in record["figures"].items()
        ],
    }
