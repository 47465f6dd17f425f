"""One self-contained HTML page: sections of text, pictures and tables, with nothing to load from elsewhere.

`render_report` knows nothing of training; the functions above it turn results into sections.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import numpy as np

from tools.figures import correlation_png, curve_png, image_png, phases_png
from tools.profile.result import headline

SHOWN_FEATURES = 128  # a heat map with more cells than pixels would show averages, not correlations


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows, for readers who cannot see it."""

    png: bytes
    description: str


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or more of explanation, and what they are about.

    `pictures` stand side by side where there is room. The first row of `table` is its header, the first
    column names the rows.
    """

    title: str
    text: str
    pictures: Sequence[Picture] = ()
    small_pictures: bool = False
    table: Sequence[Sequence[str]] = ()


def views_section(views_VNHWC: np.ndarray) -> Section:
    """Pairs of distorted views, uint8 RGB, as the network sees them but without the normalisation."""
    pairs = zip(*views_VNHWC, strict=True)
    return Section(
        "What the network sees",
        "Each pair is one image, cropped and distorted twice, left and right. The network learns to give "
        "both the same embedding: it must ignore position, scale and colour and keep what the image shows.",
        [
            Picture(image_png(np.concatenate(pair, axis=1)), f"Both views of image {number}")
            for number, pair in enumerate(pairs, start=1)
        ],
        small_pictures=True,
    )


def loss_section(records: Sequence[Mapping[str, float]]) -> Section:
    """The loss and its two terms over the steps, from the records of `metrics.jsonl`."""
    titles = {
        "loss": "Loss",
        "invariance": "Invariance: both views agree",
        "redundancy": "Redundancy: features differ",
    }
    records = [record for record in records if titles.keys() <= record.keys()]  # a skipped step has no loss
    steps = [int(record["step"]) for record in records]
    first, last = records[0], records[-1]
    return Section(
        "The loss",
        "The loss adds two terms. Invariance is the sum of (1 - C_ii)², which is small where each feature of "
        "one view predicts the same feature of the other. Redundancy, which counts with a small weight, is "
        "the sum of the squares of all other entries of C, small where the features tell different things. "
        f"From step {first['step']} to step {last['step']} the loss went from {first['loss']:.4g} to "
        f"{last['loss']:.4g}.",
        [
            Picture(
                curve_png(steps, [record[name] for record in records], title),
                f"{title}, from {first[name]:.4g} to {last[name]:.4g}",
            )
            for name, title in titles.items()
        ],
    )


def correlation_section(before_DD: np.ndarray, after_DD: np.ndarray, num_samples: int) -> Section:
    """Both cross-correlation matrices (float, -1 to 1) as heat maps and in figures."""
    width = len(before_DD)
    shown = min(width, SHOWN_FEATURES)
    extent = (
        f"The pictures show the first {shown} of {width} features; the table counts all of them."
        if shown < width
        else f"The pictures show all {width} features."
    )
    matrices = {"before training": before_DD, "after training": after_DD}
    table = [("", "mean of the diagonal", "mean size of the rest")]
    for name, c_DD in matrices.items():
        diagonal = c_DD.diagonal()
        rest = (np.abs(c_DD).sum() - np.abs(diagonal).sum()) / (width * (width - 1))
        table.append((name, f"{diagonal.mean():.3f}", f"{rest:.3f}"))
    return Section(
        "The cross-correlation matrix",
        "Row i, column j: how feature i of one view goes with feature j of the other, over a batch of "
        f"{num_samples} images. The goal is red (1) on the diagonal and white (0) everywhere else. {extent}",
        [
            Picture(correlation_png(c_DD[:shown, :shown], name.capitalize()), f"Cross-correlation {name}")
            for name, c_DD in matrices.items()
        ],
        table=table,
    )


def accuracy_section(accuracies: Mapping[str, Mapping[str, float]], classes: int) -> Section:
    """Shares of right answers on the held-out images: by what made the features, then by classifier."""
    classifiers = list(next(iter(accuracies.values())))
    rows = [
        (features, *(f"{by_classifier[name]:.1%}" for name in classifiers))
        for features, by_classifier in accuracies.items()
    ]
    return Section(
        "What the features are good for",
        "Share of held-out images whose class a simple classifier finds from frozen features. The network "
        f"never saw a label. Guessing among the {classes} classes gives {1 / classes:.1%}.",
        table=[("features", *classifiers), *rows],
    )


def profile_section(profile: Mapping[str, Any]) -> Section:
    """How a step's time divides into phases, and what limits the speed; `profile` is a whole one."""
    run, ceilings = profile["run"], profile["ceilings"]
    return Section(
        "Where the time goes",
        f"Mean of {profile['steps']} steps of {profile['settings']['batch_size']} pairs of views. "
        f"{profile['verdict']['sentence']}",
        [Picture(phases_png(run["phases"], headline(profile)), "The phases of one step as parts of a bar")],
        table=[
            ("", "pairs of views per second"),
            ("loader and step together", f"{run['pairs_per_second']:.1f}"),
            ("loader alone", f"{ceilings['loader']['pairs_per_second']:.1f}"),
            ("step alone", f"{ceilings['step']['pairs_per_second']:.1f}"),
        ],
    )


def settings_section(settings: Mapping[str, str]) -> Section:
    """What it takes to make the same page again."""
    return Section(
        "Settings and versions",
        "Seed and settings fix the run: order, crops and colours are pure functions of them.",
        table=[("name", "value"), *settings.items()],
    )


def render_report(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The HTML page. All text is escaped; pictures are inlined."""
    body = "\n".join(_section_html(section) for section in sections)
    return _PAGE.substitute(title=html.escape(title), summary=html.escape(summary), body=body)


def _section_html(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>"]
    if section.pictures:
        images = "".join(
            f'<img src="data:image/png;base64,{base64.b64encode(picture.png).decode()}" '
            f'alt="{html.escape(picture.description)}">'
            for picture in section.pictures
        )
        parts.append(f'<div class="{"tiles" if section.small_pictures else "figures"}">{images}</div>')
    if section.table:
        header, *rows = section.table
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        lines = "".join(_row_html(row) for row in rows)
        parts.append(f"<div class='wide'><table><tr>{head}</tr>{lines}</table></div>")
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _row_html(row: Sequence[str]) -> str:
    name, *cells = (html.escape(cell) for cell in row)
    return f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: #fff; color: #1f2933;
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 0 0 .3rem; }
p { margin: 0 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }
.summary { font-size: 1.1rem; }
section { border-top: 1px solid #e4e7eb; margin-top: 1.6rem; padding-top: 1.2rem; }
.figures { display: grid; gap: .8rem;
           grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
.figures img { width: 100%; }
.tiles { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.tiles img { width: 100%; image-rendering: pixelated; border-radius: 3px; }
.wide { overflow-x: auto; margin-top: .6rem; }
table { border-collapse: collapse; font-size: .95rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.4rem .3rem 0;
         border-bottom: 1px solid #e4e7eb; }
tr:first-child th { color: #616e7c; font-weight: 500; }
tr + tr th { font-weight: 500; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="summary">$summary</p>
$body
</body>
</html>
""")
