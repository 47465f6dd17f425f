"""All parts of an audit, one after the other.

1. draw images and embed them
2. neighbours, and what they predict; sheets of queries
3. accuracy by class and subgroup
4. distortions that are ignored
5. attributes that can be read
6. dead and redundant dimensions
7. drift against another encoder

Shape legend: N images drawn, F feature width, k neighbours, Q queries of a sheet.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.audit.attributes import Attribute, image_attributes, read_attributes
from eval.audit.config import AuditConfig
from eval.audit.dimensions import Dimensions, measure_dimensions
from eval.audit.drift import Drift, measure_drift, verdict
from eval.audit.groups import Group, accuracy_by_group
from eval.audit.invariance import Invariance, measure_invariance
from eval.audit.leaks import Leak, read_out
from eval.audit.neighbours import classify, nearest, one_of_each_class, worst
from eval.audit.sample import Drawn, Encoder, draw
from eval.progress import Progress
from pipelines.source import Source

Bars = Callable[[str], AbstractContextManager[Progress]]  # a bar of progress by what it is about


@dataclass(frozen=True)
class Sheet:
    """Queries and their neighbours, nearest first; numbers of the images drawn."""

    queries_Q: Tensor
    neighbours_Qk: Tensor
    similarities_Qk: Tensor


@dataclass(frozen=True)
class Audit:
    """What was found. `left_out` says which parts there are not, and why."""

    drawn: Drawn
    by_class: Sheet
    worst: Sheet | None
    mean_similarity: float  # of the images to their neighbours
    same_class_share: float | None  # of the neighbours
    accuracy: Group | None
    classes: list[Group]
    subgroups: dict[str, list[Group]]
    invariance: Invariance
    leaks: list[Leak]
    dimensions: Dimensions
    drift: Drift | None
    may_be_silent: bool | None
    verdict: str | None
    left_out: list[str] = field(default_factory=list)


def audit(
    encoder: Encoder,
    source: Source,
    config: AuditConfig,
    device: torch.device,
    bars: Bars,
    *,
    against: Encoder | None = None,
    attributes: Path | None = None,
) -> Audit:
    """Look at what `encoder` makes of images of `source`, labelled or not, and of one encoder beside another.

    `against` is the encoder in use, if `encoder` is to replace it. `attributes` is a CSV file; see
    `read_attributes`. Raises `DataError` for too few images, a bad file or an image that cannot be read,
    `ModelError` where a feature is not finite.
    """
    left_out: list[str] = []
    drawn = draw(source, config.images, config.seed)  # 1
    own = read_attributes(attributes, drawn) if attributes else []
    if not attributes:
        left_out.append(
            "Accuracy by subgroup, and probes of given attributes: there is no file of attributes."
        )
    is_labelled = len(drawn.classes) > 1
    if not is_labelled:
        left_out.append("Accuracy, and neighbours of other classes: the images have no labels.")
    with bars("extracting features") as progress:
        features_NF = encoder.embed(drawn, device, progress)

    labels_N = torch.from_numpy(drawn.labels_N)
    similarities_Nk, indices_Nk = nearest(
        features_NF, min(max(config.k, config.neighbours), len(drawn) - 1)
    )  # 2
    predicted_N = _predict(similarities_Nk, indices_Nk, drawn, config) if is_labelled else None
    queries_Q = _queries(labels_N, is_labelled, config)
    shown = similarities_Nk[:, : config.neighbours], indices_Nk[:, : config.neighbours]
    is_same_Nk = labels_N[shown[1]] == labels_N[:, None]

    accuracy, classes, subgroups = None, [], {}
    if is_labelled:  # 3
        right_N = (predicted_N == labels_N).numpy()
        (accuracy,) = accuracy_by_group(right_N, {"all": np.arange(len(drawn))}, config.min_group)
        classes = accuracy_by_group(right_N, _by_class(drawn), config.min_group)
        per_class = len(drawn) / len(np.unique(drawn.labels_N))
        if per_class <= config.k:
            left_out.append(
                f"The accuracy among all images: with {per_class:.1f} images of a class the {config.k} "
                "neighbours must be of others, so the figures are too low; look at more, or run eval knn."
            )
        subgroups = {each.name: accuracy_by_group(right_N, each.members(), config.min_group) for each in own}

    distorted = _some(len(drawn), config.distorted_images, config.seed)  # 4
    with bars("distorting images") as progress:
        invariance = measure_invariance(encoder, drawn, distorted, device, config.seed, progress)

    leaks, not_probed = _leaks(features_NF, [*own, *image_attributes(drawn)], config, bars)  # 5
    left_out += not_probed
    dimensions = measure_dimensions(features_NF, config.dead_share, config.correlated)  # 6
    if dimensions.images <= dimensions.width:
        left_out.append(
            f"Ranks above {dimensions.images - 1}: {dimensions.images} images cannot fill {dimensions.width} "
            "dimensions; look at more."
        )

    drift, may_be_silent, sentence = None, None, None
    if against is not None:  # 7
        with bars("extracting the other's features") as progress:
            other_NF = against.embed(drawn, device, progress)
        other = nearest(other_NF, indices_Nk.shape[1])
        drift = measure_drift(
            (other_NF, features_NF),
            (other[1][:, : config.neighbours], shown[1]),
            (_predict(*other, drawn, config), predicted_N) if is_labelled else None,
            labels_N,
            drawn.classes,
        )
        may_be_silent, sentence = verdict(drift, config.silent, config.min_group)
    return Audit(
        drawn=drawn,
        by_class=_sheet(queries_Q, *shown),
        worst=_sheet(worst(shown[1], shown[0], labels_N, config.sheet_rows), *shown) if is_labelled else None,
        mean_similarity=shown[0].mean().item(),
        same_class_share=is_same_Nk.double().mean().item() if is_labelled else None,
        accuracy=accuracy,
        classes=classes,
        subgroups=subgroups,
        invariance=invariance,
        leaks=leaks,
        dimensions=dimensions,
        drift=drift,
        may_be_silent=may_be_silent,
        verdict=sentence,
        left_out=left_out,
    )


def _predict(similarities_Nk: Tensor, indices_Nk: Tensor, drawn: Drawn, config: AuditConfig) -> Tensor:
    """Classes (N,) by the votes of the nearest `config.k`."""
    labels_N, k = torch.from_numpy(drawn.labels_N), config.k
    return classify(
        similarities_Nk[:, :k], indices_Nk[:, :k], labels_N, len(drawn.classes), config.temperature
    )


def _queries(labels_N: Tensor, is_labelled: bool, config: AuditConfig) -> Tensor:
    if is_labelled:
        return one_of_each_class(labels_N, config.sheet_rows, config.seed)
    return torch.tensor(_some(len(labels_N), config.sheet_rows, config.seed))


def _some(total: int, count: int, seed: int) -> list[int]:
    """Up to `count` of the numbers below `total`, drawn by `seed`, ascending."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def _sheet(queries_Q: Tensor, similarities_Nk: Tensor, indices_Nk: Tensor) -> Sheet:
    return Sheet(queries_Q, indices_Nk[queries_Q], similarities_Nk[queries_Q])


def _by_class(drawn: Drawn) -> dict[str, np.ndarray]:
    return {name: np.flatnonzero(drawn.labels_N == label) for label, name in enumerate(drawn.classes)}


def _leaks(
    features_NF: Tensor, attributes: list[Attribute], config: AuditConfig, bars: Bars
) -> tuple[list[Leak], list[str]]:
    """The probes, and what could not be probed."""
    leaks, left_out = [], []
    with bars("probing attributes") as progress:
        for number, attribute in enumerate(attributes, start=1):
            found = read_out(
                features_NF.numpy(),
                attribute,
                folds=config.folds,
                shuffles=config.shuffles,
                seed=config.seed,
            )
            if isinstance(found, Leak):
                leaks.append(found)
            else:
                left_out.append(f"Probe of {attribute.name!r}: {found}.")
            progress(number, len(attributes))
    return leaks, left_out
