"""A plan as sentences, tables and plain data."""

from collections.abc import Sequence
from typing import Any

from tools.plan.feed import IMAGENET_IMAGES
from tools.plan.plan import Planner, Prediction, efficiency

Row = tuple[str, ...]
Scale = Sequence[Prediction | str]
GB, MB = 1e9, 1e6


def headline(p: Prediction) -> str:
    """The answer in a sentence."""
    train = p.config.train
    whose = "ImageNet's " if p.dataset.images == IMAGENET_IMAGES else ""
    return (
        f"{p.cluster}: {1000 * p.seconds:.1f} ms a step of {train.batch_size} pairs, "
        f"{p.pairs_per_second:,.0f} pairs/s ({p.pairs_per_second / p.cluster.gpus:,.0f} per GPU), "
        f"{p.hours:.1f} hours for {p.steps:,} steps ({train.epochs} epochs of {whose}"
        f"{p.dataset.images:,} images)."
    )


def tables(p: Prediction, scale: Scale) -> list[tuple[str, list[Row]]]:
    """Titles and rows, the first of them the header."""
    found = [("Time of a step", _time(p))]
    if p.step.traffic:
        found.append(("Collectives of a step", _traffic(p)))
    found += [("Memory of a GPU", _memory(p)), ("The same recipe on other numbers of GPUs", _scale(scale))]
    return found


def sentences(planner: Planner, p: Prediction, scale: Scale) -> list[str]:
    """What follows from the figures."""
    return [
        *_about_memory(planner, p),
        _about_feeding(p),
        _about_loss(planner, p),
        *_about_saturation(scale),
        f"Dataset: {p.dataset.source}.",
    ]


def as_dict(planner: Planner, p: Prediction, scale: Scale) -> dict[str, Any]:
    """Plain data; seconds, bytes, pairs per second."""
    predictions = [q for q in scale if isinstance(q, Prediction)]
    return {
        "plan": _figures(p),
        "parts": p.step.parts,
        "data_wait": p.data_wait,
        "sources": p.rates.sources,
        "collectives": [vars(t) for t in p.step.traffic],
        "memory": p.memory.parts | {"peak": p.memory.peak, "limit": p.memory.limit, "fits": p.memory.fits},
        "loss": {"algorithm": p.step.algorithm, "reason": p.step.reason},
        "feed": {
            "pairs_per_core": p.feed.per_core,
            "cores_per_gpu": p.cores,
            "storage_bytes_per_second": p.pairs_per_second * p.dataset.image_bytes,
            "source": p.feed.source,
        },
        "dataset": vars(p.dataset),
        "scale": [_figures(q) | {"efficiency": efficiency(q, predictions[0])} for q in predictions],
        "not_possible": [q for q in scale if isinstance(q, str)],
        "sentences": sentences(planner, p, scale),
    }


def _figures(p: Prediction) -> dict[str, Any]:
    return {
        "gpu": p.cluster.gpu.name,
        "gpus": p.cluster.gpus,
        "machines": p.cluster.machines,
        "pairs_per_gpu": p.step.pairs,
        "step_seconds": p.seconds,
        "pairs_per_second": p.pairs_per_second,
        "steps": p.steps,
        "hours": p.hours,
        "memory_bytes": p.memory.peak,
        "fits": p.memory.fits,
        "cores_per_gpu": p.cores,
        "exposed_communication": p.step.exposed,
        "loss_algorithm": p.step.algorithm,
        "loss_seconds": _loss_seconds(p),
        "authors_loss_seconds": p.step.authors_loss,
        "limit": p.limit,
    }


def _loss_seconds(p: Prediction) -> float:
    return p.step.parts["loss"] + p.step.parts.get("loss, exchanged", 0.0)


def _time(p: Prediction) -> list[Row]:
    rows: list[Row] = [("part", "ms", "share", "by")]
    for name, seconds in {**p.step.parts, "data wait": p.data_wait}.items():
        source = p.rates.sources.get(name.removesuffix(", exchanged"), "")
        if name == "data wait":
            source = p.feed.source
        elif name in ("loss, exchanged", "news, exchanged"):
            source = p.rates.sources["statistics"]
        rows.append((name, f"{1000 * seconds:.2f}", f"{seconds / p.seconds:.1%}", source))
    return [*rows, ("step", f"{1000 * p.seconds:.2f}", "100.0%", "")]


def _traffic(p: Prediction) -> list[Row]:
    rows: list[Row] = [("what", "operation", "count", "carries MB", "each GPU sends MB", "ms", "exposed ms")]
    rows += [
        (
            t.what,
            t.operation,
            str(t.count),
            _figure(t.bytes / MB),
            _figure(t.sent / MB),
            f"{1000 * t.seconds:.2f}",
            f"{1000 * t.exposed:.2f}",
        )
        for t in p.step.traffic
    ]
    return rows


def _figure(number: float) -> str:
    """Three digits, never as a power of ten where it is large."""
    return f"{float(f'{number:.3g}'):,g}"


def _memory(p: Prediction) -> list[Row]:
    rows: list[Row] = [("held", "GB")]
    rows += [(name, f"{size / GB:.2f}") for name, size in p.memory.parts.items() if size]
    return [*rows, ("at the peak", f"{p.memory.peak / GB:.1f} of {p.memory.limit / GB:.0f}")]


def _scale(scale: Scale) -> list[Row]:
    header = ("GPUs", "pairs each", "ms", "pairs/s", "efficiency", "hours", "GB", "cores each")
    rows: list[Row] = [(*header, "limited by", "loss ms", "authors' loss ms")]
    predictions = [q for q in scale if isinstance(q, Prediction)]
    rows += [
        (
            str(q.cluster.gpus),
            str(q.step.pairs),
            f"{1000 * q.seconds:.1f}",
            f"{q.pairs_per_second:,.0f}",
            f"{efficiency(q, predictions[0]):.0%}",
            f"{q.hours:,.1f}",
            f"{q.memory.peak / GB:.1f}",
            f"{q.cores:.1f}",
            q.limit,
            f"{1000 * _loss_seconds(q):.1f} {q.step.algorithm}",
            f"{1000 * q.step.authors_loss:.1f}",
        )
        for q in predictions
    ]
    return rows


def _about_memory(planner: Planner, p: Prediction) -> list[str]:
    if p.memory.fits:
        return []
    return [
        f"Does not fit: a GPU would need {p.memory.peak / GB:.1f} GB and has {p.memory.limit / GB:.0f}; "
        f"{planner.what_makes_it_fit(p)}."
    ]


def _about_feeding(p: Prediction) -> str:
    if p.feed.per_core is None:
        return "Feeding: nothing is read or decoded."
    local, per_gpu = min(p.cluster.gpus, p.cluster.per_machine), p.pairs_per_second / p.cluster.gpus
    text = (
        f"Feeding: {per_gpu:,.0f} pairs/s and {p.cores:.1f} cores for each GPU, {per_gpu * local:,.0f} and "
        f"{p.cores * local:.0f} for a machine of {local}, at {p.feed.per_core:.0f} pairs/s a core "
        f"({p.feed.source}); storage of {p.pairs_per_second * p.dataset.image_bytes / MB:,.0f} MB/s in all."
    )
    if p.data_wait > 0:
        text += f" The {p.feed.limited_by} deliver at most {p.feed.limit:,.0f} pairs/s to a GPU."
        if p.feed.limited_by == "workers":
            text += " Raise data.workers."
    return text


def _about_loss(planner: Planner, p: Prediction) -> str:
    reason = p.step.reason
    text = (
        f"Loss: {reason}." if reason.startswith(p.step.algorithm) else f"Loss: {p.step.algorithm}, {reason}."
    )
    at_hand = planner.algorithm_at_hand(p)
    if at_hand != p.step.algorithm:
        text += (
            f" The trainer does not know this link and would take {at_hand}; set "
            f"model.loss.algorithm={p.step.algorithm}."
        )
    return text


def _about_saturation(scale: Scale) -> list[str]:
    predictions = [q for q in scale if isinstance(q, Prediction)]
    found = []
    fitting = [q.cluster.gpus for q in predictions if q.memory.fits]
    if not fitting:
        found.append("Memory: fits on none of these numbers of GPUs.")
    elif fitting[0] > 1:
        found.append(f"Memory: fits from {fitting[0]} GPUs on.")
    for limit, words in (
        ("link", "Link: from {} GPUs on a quarter of the step or more is communication."),
        ("cores", "Cores: at {} GPUs they deliver less than the GPUs take."),
        ("workers", "Workers: at {} GPUs data.workers deliver less than the GPUs take."),
    ):
        limited = [str(q.cluster.gpus) for q in predictions if q.limit == limit]
        if limited:
            found.append(words.format(limited[0] if limit == "link" else ", ".join(limited)))
    best = max(predictions, key=lambda q: q.pairs_per_second)
    if best is not predictions[-1]:
        found.append(
            f"Batch: beyond {best.cluster.gpus} GPUs each has too few pairs, and the run gets slower."
        )
    refused = [text for text in scale if isinstance(text, str)]
    if refused:
        found.append(f"Batch: {refused[0]}")
    return found
