"""An audit as one page to look at."""

from collections.abc import Mapping, Sequence

import numpy as np

from eval.audit.config import AuditConfig
from eval.audit.groups import Group
from eval.audit.run import Audit, Sheet
from pipelines.source import read_image
from tools.figures_audit import groups_png, invariance_png, leaks_png, sheet_png, spectrum_png
from tools.report import Picture, Section, render_report

MAX_ROWS = 40  # of a table; audit.json has all
CAUTION = (
    "With many groups some intervals of 95 % miss the truth by chance, one in twenty. A group is only said "
    "to stand out where it is large enough and even the interval that is corrected for the number of groups "
    "(Bonferroni) leaves out the accuracy of all images."
)


def audit_page(found: Audit, config: AuditConfig, title: str, settings: Mapping[str, str]) -> str:
    """The HTML page, with nothing to load from elsewhere. `settings` go into its last table."""
    sections = [*_neighbour_sections(found, config), *_accuracy_sections(found)]
    sections += [_invariance_section(found), _leaks_section(found), _dimensions_section(found, config)]
    if found.drift is not None:
        sections.append(_drift_section(found))
    if found.left_out:
        sections.append(
            Section("What is not here", "And why.", table=[("",), *((line,) for line in found.left_out)])
        )
    sections.append(
        Section(
            "Settings and versions",
            "Seed and settings fix the images that are drawn, the distortions and the folds of the probes.",
            table=[("name", "value"), *settings.items()],
        )
    )
    return render_report(title, summary_of(found), sections)


def summary_of(found: Audit) -> str:
    """A few sentences on the whole."""
    drawn, dimensions = found.drawn, found.dimensions
    parts = [found.verdict] if found.verdict else []
    parts.append(f"{len(drawn):,} of {len(drawn.whole):,} images of {drawn.path}.")
    if found.accuracy is not None:
        parts.append(
            f"Their neighbours find the class of {found.accuracy.accuracy:.1%} "
            f"({found.accuracy.low:.1%} to {found.accuracy.high:.1%})."
        )
    parts.append(
        f"{len(dimensions.dead)} of {dimensions.width} dimensions are dead; the effective rank is "
        f"{dimensions.effective_rank:.1f}."
    )
    read = [leak.name for leak in found.leaks if leak.leaks]
    parts.append(f"Readable attributes: {', '.join(read) or 'none'}.")
    return " ".join(parts)


def _neighbour_sections(found: Audit, config: AuditConfig) -> list[Section]:
    shown, share = found.by_class.neighbours_Qk.shape[1], found.same_class_share
    frames = "Blue frames: of the query's class; orange: of another. " if share is not None else ""
    means = f"The mean similarity of an image to these is {found.mean_similarity:.3f}. "
    if share is not None:
        means += f"{share:.1%} of them are of its class. "
    first = "Queries of different classes" if share is not None else "Queries drawn at random"
    sections = [
        _sheet_section(
            found,
            found.by_class,
            "Nearest neighbours",
            f"{first}, at the left, and their {shown} nearest of the {len(found.drawn):,} images, by the "
            f"cosine of the features. {frames}{means}",
        )
    ]
    if found.worst is not None and len(found.worst.queries_Q):
        text = f"Images with the most neighbours of other classes, and among these the nearest. {frames}"
        sections.append(_sheet_section(found, found.worst, "The worst neighbours", text))
    return sections


def _sheet_section(found: Audit, sheet: Sheet, title: str, text: str) -> Section:
    queries, table = sheet.queries_Q.tolist(), []
    rows, same = [], []
    for query, neighbours in zip(queries, sheet.neighbours_Qk.tolist(), strict=True):
        rows.append([np.asarray(read_image(found.drawn, index)) for index in (query, *neighbours)])
        labels = found.drawn.labels_N[[query, *neighbours]]
        same.append([bool(label == labels[0]) if found.drawn.classes else None for label in labels[1:]])
        table.append((found.drawn.name(query), _class_of(found, query), _classes_of(found, neighbours)))
    picture = Picture(sheet_png(rows, same), f"{title}: {len(rows)} rows of a query and its neighbours")
    header = ("query", "class", "neighbours' classes")
    return Section(title, text, [picture], table=[header, *table] if found.drawn.classes else ())


def _accuracy_sections(found: Audit) -> list[Section]:
    if found.accuracy is None:
        return []
    overall = found.accuracy.accuracy
    text = (
        "Each image's class is what its neighbours among the others vote for, its own label aside. All "
        f"images: {overall:.1%}. Intervals are Wilson's of 95 %. {CAUTION}"
    )
    sections = [_groups_section("Accuracy by class", text, found.classes, overall)]
    for name, groups in found.subgroups.items():
        if groups:
            sections.append(_groups_section(f"Accuracy by {name}", CAUTION, groups, overall))
    return sections


def _groups_section(title: str, text: str, groups: Sequence[Group], overall: float) -> Section:
    ordered = sorted(groups, key=lambda group: group.accuracy)
    more = f" The {MAX_ROWS} lowest of {len(ordered)}." if len(ordered) > MAX_ROWS else ""
    rows = [
        (
            each.name,
            str(each.images),
            f"{each.accuracy:.1%}",
            f"{each.low:.1%} to {each.high:.1%}",
            "too small" if each.too_small else "stands out" if each.stands_out else "",
        )
        for each in ordered[:MAX_ROWS]
    ]
    picture = Picture(groups_png(groups, overall, title), f"{title}, with intervals")
    return Section(title, text + more, [picture], table=[("", "images", "accuracy", "interval", ""), *rows])


def _invariance_section(found: Audit) -> Section:
    invariance = found.invariance
    rows = []
    for curve in sorted(invariance.curves, key=lambda curve: -min(curve.ignored)):
        at = int(np.argmin(curve.ignored))
        spread = curve.similarities[at]
        rows.append(
            (
                curve.name + (" (the paper's)" if curve.is_papers else ""),
                f"{curve.strengths[at]:g} ({curve.unit})",
                f"{spread.mean:.3f}",
                f"{spread.p10:.3f} to {spread.p90:.3f}",
                f"{curve.ignored[at]:.0%}",
            )
        )
    return Section(
        "Which distortions it ignores",
        "Cosine of the features of an image and of its distorted self: the mean of "
        f"{invariance.images} images, and the band of the middle four fifths of them. Grey: the same of two "
        f"different images, {invariance.baseline.mean:.3f} in the mean. 'Ignored' puts the mean between that "
        "(0 %) and the very same features (100 %), at the strength that matters most. What training was to "
        "make it ignore should stand at the top of the table, what must make a difference at the bottom.",
        [Picture(invariance_png(invariance), "Similarity by strength for each distortion")],
        table=[("distortion", "strength", "similarity", "four fifths", "ignored"), *rows],
    )


def _leaks_section(found: Audit) -> Section:
    rows = [
        (
            leak.name,
            str(leak.images),
            str(len(leak.categories)),
            f"{leak.balanced_accuracy:.1%}",
            f"{leak.low:.1%} to {leak.high:.1%}",
            f"{leak.chance:.1%}",
            f"{leak.shuffled:.1%}",
            ("can be read" if leak.leaks else "") + ("" if leak.converged else " (not converged)"),
        )
        for leak in found.leaks
    ]
    header = ("", "images", "categories", "balanced accuracy", "interval", "constant", "shuffled", "")
    return Section(
        "What can be read from the features",
        "A linear classifier on the features guesses the attribute of images that it was not fitted on; "
        "numbers are cut into thirds. It can be read where the interval of 95 % is above what a constant "
        "answer gets and above the same classifiers on shuffled values. With many attributes one in forty "
        "may seem readable by chance. One that cannot be read so may yet be read by something stronger, "
        "and one that goes with the class can be read because of the class.",
        [Picture(leaks_png(found.leaks), "Balanced accuracy of each attribute")] if found.leaks else [],
        table=[header, *rows] if rows else (),
    )


def _dimensions_section(found: Audit, config: AuditConfig) -> Section:
    of = found.dimensions
    most = of.most_correlated
    rows = [
        ("effective rank (entropy of the covariance's eigenvalues)", f"{of.effective_rank:.1f}"),
        ("RankMe (entropy of the singular values)", f"{of.rankme:.1f}"),
        ("participation ratio", f"{of.participation_ratio:.1f}"),
        ("dead dimensions", f"{len(of.dead)} of {of.width}"),
        ("mean |correlation| of two dimensions", f"{of.mean_correlation:.3f}"),
        (f"pairs above {config.correlated:g}", f"{of.redundant_pairs:,} of {of.pairs:,}"),
        ("most correlated", f"{most[0]} and {most[1]}: {most[2]:.3f}" if most else "none"),
        ("length of a feature", f"{of.norms['mean']:.3g} ± {of.norms['std']:.2g}"),
        ("least and largest", f"{of.norms['min']:.3g}, {of.norms['max']:.3g}"),
    ]
    return Section(
        "Dead and redundant dimensions",
        f"How much of its {of.width} dimensions the embedding of {of.images:,} images fills. A dimension is "
        f"dead where it varies by less than {config.dead_share:.0%} of the median one.",
        [Picture(spectrum_png(of.eigenvalues), "Share of the variance by principal component")],
        table=[("", ""), *rows],
    )


def _drift_section(found: Audit) -> Section:
    drift = found.drift
    rows = [
        ("cosine of an image's two features", _number(drift.cosine), ""),
        ("linear CKA, debiased", _number(drift.cka), "0"),
        ("linear CKA, not debiased", _number(drift.cka_biased), ""),
        (f"shared of the {drift.k} nearest", f"{drift.overlap:.1%}", f"{drift.overlap_chance:.1%}"),
        ("Jaccard index of the nearest", f"{drift.jaccard:.1%}", f"{drift.jaccard_chance:.1%}"),
    ]
    if drift.agreement is not None:
        rows += [
            ("predictions that agree", f"{drift.agreement:.1%}", ""),
            ("accuracy, old and new", f"{drift.accuracy_before:.1%}, {drift.accuracy_after:.1%}", ""),
            (
                "images that became right, wrong",
                f"{drift.became_right}, {drift.became_wrong} (McNemar p = {drift.p_value:.2g})",
                "",
            ),
        ]
    for each in sorted(drift.classes, key=lambda of: -of.changed)[:MAX_ROWS]:
        to = f", most now {each.most_often_to}" if each.most_often_to else ""
        rows.append(
            (
                f"class {each.name} ({each.images})",
                f"{each.changed:.1%} changed{to}",
                f"accuracy {each.before:.1%} to {each.after:.1%}",
            )
        )
    return Section(
        "Drift against the other encoder",
        f"{found.verdict} Stored features stay comparable only where the cosine is near 1; CKA and "
        "neighbours do not mind a rotation of the space. Classes are those of each encoder's neighbours.",
        table=[("", "found", "by chance"), *rows],
    )


def _class_of(found: Audit, index: int) -> str:
    return found.drawn.classes[found.drawn.labels_N[index]] if found.drawn.classes else ""


def _classes_of(found: Audit, indices: Sequence[int]) -> str:
    """How many of each class, most first."""
    names = [_class_of(found, index) for index in indices]
    return ", ".join(
        f"{names.count(name)} {name}" for name in sorted(set(names), key=lambda n: -names.count(n))
    )


def _number(value: float | None) -> str:
    return "widths differ" if value is None else f"{value:.3f}"
