"""The text of a model card, from the facts that `tools.model_card` has gathered.

`None` and absent facts become "unknown"; nothing here is measured or guessed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from tools.model_card.hugging_face import front_matter
from tools.model_card.limits import DISALLOWED_USE, INTENDED_USE, limits_of
from tools.model_card.usage import usage_of

UNKNOWN = "unknown"
_SHORT_HASH = 12


def card_text(card: dict[str, Any]) -> str:
    """The whole Markdown file."""
    parts = [
        f"---\n{yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True)}---",
        f"# {card['name']}",
        _summary(card),
        *("## Files", _files(card), "## How to use it", usage_of(card)),
        *("## Intended use", _owner(card, "intended_use", INTENDED_USE)),
        *("## Use that is not allowed", _owner(card, "disallowed_use", DISALLOWED_USE)),
        *("## Limits", _bullets(limits_of(card))),
        *("## Evaluations", _evaluations(card)),
        *("## Data", _data(card), "## Objective and training", _training(card)),
        *("## Distortions", _distortions(card)),
        *("## Where it comes from, and how to go back", _provenance(card)),
        *("## Licence and contact", _contact(card)),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(card: dict[str, Any]) -> str:
    model, settings, step = card["model"], card["settings"], card["checkpoint"]["step"]
    stem = " with the small stem for small images (3x3, stride 1, no pooling)" if model["small_stem"] else ""
    if settings is None:
        origin = "How it was trained is unknown to this card."
    elif step == 0:
        origin = "It has not been trained: no step has been done."
    else:
        origin = (
            "It was trained without labels by Barlow Twins "
            "([Zbontar et al. 2021](https://arxiv.org/abs/2103.03230))."
        )
    return (
        f"A {model['backbone']}{stem}, {model['parameters']:,} parameters, that makes {model['feature_dim']} "
        f"features of an image. {origin} It is a backbone: it names nothing in an image until something is "
        f"trained on its features."
    )


def _files(card: dict[str, Any]) -> str:
    rows = [("file", "format", "holds", "bytes", "read back with", "largest difference", "SHA-256")]
    for file in card["files"]:
        holds = f"backbone and projector {file['projector']}" if file["projector"] else "backbone"
        same = f"{file['difference']:.1e}" if file["difference"] else "none"
        name, size = f"`{file['file']}`", f"{file['bytes']:,}"
        rows.append((name, file["format"], holds, size, file["reader"], same, f"`{file['sha256']}`"))
    return (
        _table(rows)
        + "\n\nThe difference is of the outputs on random images from those of the checkpoint, as "
        "a share of the largest number in each output."
    )


def _owner(card: dict[str, Any], key: str, default: str) -> str:
    return card["owner"][key] or f"The owner has stated nothing; what holds for any such network: {default}"


def _evaluations(card: dict[str, Any]) -> str:
    rows = [("protocol", "figure", "learned from", "measured on", "settings", "date")]
    for record in card["evaluations"]:
        roles = record["data"]
        others = ", ".join(_dataset(of) for role, of in roles.items() if role != "test") or "-"
        test = _dataset(roles["test"]) if "test" in roles else UNKNOWN
        figures = ", ".join(f"{name} {value:.2%}" for name, value in record["figures"].items())
        rows.append((record["protocol"], figures, others, test, _flat(record["settings"]), record["date"]))
    text = (
        _table(rows) + "\n\nEach was measured with the checkpoint below, by its SHA-256."
        if card["evaluations"]
        else "None was found beside the checkpoint."
    )
    missing = card["not_evaluated"]
    titles = [f"{title}: not evaluated" for title in missing["protocols"].values()]
    return f"{text}\n\n{_bullets(titles + [f'{name}: not evaluated' for name in missing['properties']])}"


def _data(card: dict[str, Any]) -> str:
    data = card["data"]
    rows = [("", ""), ("dataset", data.get("path")), ("images", data.get("images"))]
    if "why_unknown" in data:
        return f"{_table(rows)}\n\nMore is unknown: {data['why_unknown'].rstrip('.')}."
    sizes = data["sizes"]
    per_class, classes = data["images_per_class"], data["classes"]
    labels = "none" if not data["labelled"] else f"{len(classes)} classes, which the training did not use"
    rows += [
        ("SHA-256 of the dataset", f"`{data['sha256']}`"),
        ("converted from", f"{data['source']} ({data['source_kind']}), on {data['converted']}"),
        ("fingerprint of the source", f"`{data['source_fingerprint']}`"),
        ("stored with", _flat(data["settings"])),
        ("mean size in pixels", f"{sizes['mean_width']:g} x {sizes['mean_height']:g}"),
        ("images left out as damaged", data["left_out"]),
        ("labels", labels),
    ]
    if data["labelled"] and per_class:
        rows.append(("images per class", f"{per_class[0]} to {per_class[1]}"))
    return _table(rows)


def _training(card: dict[str, Any]) -> str:
    settings, checkpoint, training = card["settings"], card["checkpoint"], card["training"]
    if settings is None:
        return f"Objective, settings and course of the training are {UNKNOWN}: {training['why_unknown']}."
    model, loss, train = settings["model"], settings["model"]["loss"], settings["train"]
    done = f"{checkpoint['step']:,} of {checkpoint['total_steps']:,} ({checkpoint['epochs']:.4g} epochs)"
    start = train["initial_weights"]
    rows = [
        ("", ""),
        ("weight of the invariance term, sum of (1 - C_ii)^2", loss["invariance_weight"]),
        ("weight of the redundancy term, sum of C_ij^2 for i != j", loss["off_diagonal_weight"]),
        ("normalise", loss["normalise"]),
        ("temperature of the cross-entropy", loss["temperature"] or "none: sums of squares"),
        ("gradient divided by", loss["reference_world_size"]),
        ("projector", model["projector"]),
        ("batch-norm", _flat({key: model[key] for key in ("norm", "sync_bn")})),
        ("steps", done),
        ("batch", train["batch_size"]),
        ("precision", train["precision"]),
        ("optimiser", f"LARS; {_flat(train['optim'])}"),
        ("seed", settings["seed"]),
        ("started from", f"{start} (its checksum is {UNKNOWN})" if start else "random weights"),
        ("hardware", card["owner"]["hardware"] or f"{UNKNOWN}: the run does not record it"),
    ]
    if "why_unknown" in training:
        return f"{_table(rows)}\n\nThe course of the training is {UNKNOWN}: {training['why_unknown']}."
    rows += [(f"last report: {name}", _number(value)) for name, value in training["last"].items()]
    rows += [
        ("pairs/s, median of the reports", _number(training["pairs_per_second"])),
        ("hours, up to the last report", f"{training['hours']:.4g}, in {training['starts']} start(s)"),
        ("steps skipped as not finite", training["skipped_steps"]),
        ("images that could not be read", training["bad_samples"]),
        ("share of the GPU's peak (MFU), median", _number(training["mfu"])),
        ("GPU memory, GiB", _number(training["memory_gib"])),
        ("linear probe while training", _curve(training["probe_accuracy"])),
        ("kNN while training", _curve(training["knn_accuracy"])),
    ]
    return f"{_table(rows)}\n\nFrom {training['log']}, SHA-256 `{training['log_sha256']}`."


def _distortions(card: dict[str, Any]) -> str:
    if card["settings"] is None:
        return UNKNOWN.capitalize() + "."
    data = card["settings"]["data"]
    augment = data["augment"]
    rows = [("", "first view", "second view")]
    rows += [
        (name, _plain(value), _plain(augment["view_b"][name])) for name, value in augment["view_a"].items()
    ]
    size = data["image_size"]
    return f"{_table(rows)}\n\nViews of {size} x {size} pixels, distorted by {augment['implementation']}."


def _provenance(card: dict[str, Any]) -> str:
    checkpoint, previous, replaced = card["checkpoint"], card["previous_checkpoint"], card["replaced"]
    lines = [f"Exported on {card['made']} by fastbarlow {card['versions']['fastbarlow']} from "]
    lines[0] += f"{checkpoint['path']}, SHA-256 `{checkpoint['sha256']}`."
    if previous:
        lines.append(
            f"The run's checkpoint before it is {previous['path']}, SHA-256 `{previous['sha256']}`: to go "
            f"back, export that, after comparing its checksum (`sha256sum`), since the run may replace it."
        )
    else:
        lines.append("No checkpoint of the run from before it lies beside it.")
    if replaced:
        files = ", ".join(f"{file['file']} `{file['sha256'][:_SHORT_HASH]}`" for file in replaced["files"])
        source = replaced["checkpoint"]
        lines.append(
            f"It took the place of an export of {source['path']}, SHA-256 `{source['sha256']}` ({files}): to "
            f"go back, export that checkpoint again."
        )
    else:
        lines.append("It took the place of no other export that has a card.")
    return _bullets(lines)


def _contact(card: dict[str, Any]) -> str:
    owner = card["owner"]
    return _bullets(f"{name}: {owner[key] or UNKNOWN}" for name, key in _CONTACT)


_CONTACT = ("Licence of the weights", "licence"), ("Owner", "owner"), ("Contact", "contact")


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; the first row is the header."""
    cells = [[_cell(value) for value in row] for row in rows]
    cells.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    return UNKNOWN if value is None else " ".join(str(value).split()).replace("|", "\\|")


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _dataset(of: dict[str, Any]) -> str:
    return f"{of['path']} ({of['images']:,} images, {of['classes']} classes)"


def _flat(settings: dict[str, Any], prefix: str = "") -> str:
    """`a.b 1, c 2`."""
    parts = []
    for name, value in settings.items():
        key = f"{prefix}{name}"
        is_section = isinstance(value, dict) and value
        parts.append(_flat(value, f"{key}.") if is_section else f"{key} {_plain(value)}")
    return ", ".join(parts)


def _plain(value: Any) -> str:
    return " to ".join(f"{x:.4g}" for x in value) if isinstance(value, list) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _curve(points: list[list[float]]) -> str:
    text = ", ".join(f"{value:.1%} (step {step:,})" for step, value in points)
    return text or "not evaluated"
