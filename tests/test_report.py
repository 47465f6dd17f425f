"""The report is one file that shows what it was given."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tools.figures import PHASE_COLOURS
from tools.profile.result import SPLIT
from tools.report import (
    Picture,
    Section,
    accuracy_section,
    correlation_section,
    loss_section,
    profile_section,
    render_report,
    settings_section,
    views_section,
)

SIZE = 24


class Page(HTMLParser):
    """Tags with their attributes, the text, and the cells of the tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(page)
        assert not self.open, f"unclosed {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(s.partition("base64,")[2]))) for s in sources]


def profile() -> dict:
    phases = {phase: 0.01 * (1 + i) for i, phase in enumerate(PHASE_COLOURS)}
    return {
        "steps": 7,
        "settings": {"batch_size": 32},
        "ceilings": {"loader": {"pairs_per_second": 400.0}, "step": {"pairs_per_second": 200.0}},
        "run": {"phases": phases, "step_seconds": sum(phases.values()), "pairs_per_second": 150.0},
        "verdict": {"sentence": "The step limits: 200 pairs/s."},
    }


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    random = np.random.default_rng(3)
    views_VNHWC = random.integers(0, 256, (2, 5, SIZE, SIZE, 3), dtype=np.uint8)
    records = [
        {"step": s, "loss": 90.0 / s, "invariance": 50.0 / s, "redundancy": 8.0 * s} for s in (1, 5, 9)
    ]
    before_DD, after_DD = random.uniform(-1, 1, (200, 200)), np.eye(200)
    accuracies = {"untrained network": {"kNN": 0.25, "linear": 0.5}}
    return [
        views_section(views_VNHWC),
        loss_section(records),
        correlation_section(before_DD, after_DD, num_samples=64),
        accuracy_section(accuracies, classes=8),
        profile_section(profile()),
        settings_section({"seed": "0"}),
    ]


def test_report_needs_nothing_from_elsewhere(sections: list[Section]) -> None:
    text = render_report("A run", "It went well.", sections)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 5 + 3 + 2 + 1
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_pictures_of_the_report_are_whole(sections: list[Section]) -> None:
    for image in Page(render_report("A run", "", sections)).images():
        image.load()
        assert len(np.unique(np.asarray(image.convert("L")))) > 1, "a blank picture"


def test_text_of_the_report_is_escaped() -> None:
    text = render_report("<b>", "a & b", [Section("<i>", "<script>", table=[("<u>", "x"), ("&", "<s>")])])
    assert not {"b", "i", "script", "u", "s"} & {tag for tag, _ in Page(text).tags}
    assert "a &amp; b" in text


def test_views_stand_in_pairs_with_their_own_pixels() -> None:
    views_VNHWC = np.random.default_rng(4).integers(0, 256, (2, 3, SIZE, SIZE, 3), dtype=np.uint8)
    images = Page(render_report("", "", [views_section(views_VNHWC)])).images()
    for i, image in enumerate(images):
        np.testing.assert_array_equal(image, np.concatenate(views_VNHWC[:, i], axis=1))


def test_loss_text_names_first_and_last_value(sections: list[Section]) -> None:
    assert "From step 1 to step 9 the loss went from 90 to 10." in sections[1].text
    assert [picture.description.partition(",")[0] for picture in sections[1].pictures] == [
        "Loss",
        "Invariance: both views agree",
        "Redundancy: features differ",
    ]


def test_correlation_figures_count_all_features_though_the_picture_does_not() -> None:
    c_DD = np.full((300, 300), -0.5)
    np.fill_diagonal(c_DD, 0.75)
    c_DD[200:, :100] = 0.25  # outside the picture
    section = correlation_section(np.eye(300), c_DD, num_samples=64)
    assert "first 128 of 300" in section.text and "64 images" in section.text
    rest = (300 * 299 * 0.5 - 100 * 100 * 0.25) / (300 * 299)
    assert section.table[1:] == [
        ("before training", "1.000", "0.000"),
        ("after training", "0.750", f"{rest:.3f}"),
    ]


def test_small_correlation_matrix_is_shown_whole() -> None:
    assert "all 16 features" in correlation_section(np.eye(16), np.eye(16), num_samples=8).text


def test_accuracy_table_states_the_chance_level(sections: list[Section]) -> None:
    assert "Guessing among the 8 classes gives 12.5%." in sections[3].text
    assert list(sections[3].table[1]) == ["untrained network", "25.0%", "50.0%"]


def test_profile_section_repeats_the_verdict(sections: list[Section]) -> None:
    assert profile()["verdict"]["sentence"] in sections[4].text


def test_every_phase_of_a_step_has_its_colour() -> None:
    assert tuple(PHASE_COLOURS) == SPLIT
    assert len(set(PHASE_COLOURS.values())) == len(PHASE_COLOURS)


def test_table_cells_keep_their_order() -> None:
    section = Section("t", "x", [Picture(b"", "p")], table=[("", "kNN"), ("trained", "50%")])
    assert Page(render_report("", "", [section])).cells == ["kNN", "trained", "50%"]
