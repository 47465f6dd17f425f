"""Attributes come from the file to the right images, and what is wrong with the file is one sentence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.audit.attributes import as_attribute, image_attributes, read_attributes
from eval.audit.sample import Drawn, draw
from pipelines.errors import DataError
from pipelines.source import FolderSource


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_images: Callable) -> FolderSource:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, ["ant", "bee"], per_class=15, seed=3)
    return FolderSource(folder)


def write(folder: Path, text: str) -> Path:
    path = folder / "attributes.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_draw_keeps_order_names_and_labels_and_follows_its_seed(source: FolderSource) -> None:
    drawn = draw(source, 25, seed=4)
    assert len(drawn) == 25 and (np.diff(drawn.indices_N) > 0).all()
    for place, index in enumerate(drawn.indices_N.tolist()):
        assert drawn.name(place) == source.name(index)
        assert drawn.labels_N[place] == source.labels_N[index]
        np.testing.assert_array_equal(drawn.encoded(place), source.encoded(index))
    sizes = drawn.sizes(np.arange(25))
    np.testing.assert_array_equal(sizes, source.sizes(drawn.indices_N))
    assert draw(source, 25, seed=4).indices_N.tolist() == drawn.indices_N.tolist()
    assert draw(source, 25, seed=5).indices_N.tolist() != drawn.indices_N.tolist()
    assert len(draw(source, 1000, seed=0)) == 30
    with pytest.raises(DataError, match=r"holds 30 images; an audit needs at least 40"):
        _draw_with_minimum(source)


def _draw_with_minimum(source: FolderSource) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.audit.sample.MIN_IMAGES", 40)
        draw(source, 1000, seed=0)


@pytest.mark.parametrize("by_number", [True, False])
def test_cells_reach_the_images_that_they_name(source: FolderSource, tmp_path: Path, by_number: bool) -> None:
    drawn = draw(source, 25, seed=1)
    names = [str(i) if by_number else "/".join(source.name(i).split("/")[-2:]) for i in range(30)]
    lines = ["light,name,shade"]
    for i in reversed(range(30)):
        lines.append(f"{'' if i % 5 == 0 else 'dim' if i % 2 else 'bright'},{names[i]},{i % 3}")
    light, shade = read_attributes(write(tmp_path, "\n".join(lines)), drawn)
    assert (light.name, light.categories, shade.name, shade.categories) == (
        "light",
        ["bright", "dim"],
        "shade",
        ["0", "1", "2"],
    )
    for place, i in enumerate(drawn.indices_N.tolist()):
        assert light.values_N[place] == (-1 if i % 5 == 0 else i % 2)
        assert shade.values_N[place] == i % 3
    members = shade.members()
    assert all((drawn.indices_N[members[str(of)]] % 3 == of).all() for of in range(3))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "need a column 'name'"),
        ("name\n0\n", "need a column 'name' and one or more"),
        ("image,x\n0,1\n", r"it has 'image', 'x'"),
        ("name,x,x\n0,1,2\n", "need a column 'name'"),
        ("name,x\n", "have no rows"),
        ("name,x\n0,1,2\n", "more cells than the first line"),
        ("name,x\n99,1\n", "name 1 images that .* such as '99'; name them by their number from 0 to 29"),
        ("name,x\n3,1\n3,2\n", "two rows about .*jpg; remove one"),
        ("name,x\nant/0.jpg,1\nno.jpg,2\n", "such as 'no.jpg'"),
        ("name,x\n0.jpg,1\n", "or holds more than once, such as '0.jpg'"),  # ant's and bee's
    ],
)
def test_a_bad_file_of_attributes_is_one_sentence(
    source: FolderSource, tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        read_attributes(write(tmp_path, text), draw(source, 30, seed=0))


def test_unreadable_files_and_files_about_other_images_are_refused(
    source: FolderSource, tmp_path: Path
) -> None:
    drawn = draw(source, 20, seed=0)
    left_out = next(i for i in range(30) if i not in drawn.indices_N)
    with pytest.raises(DataError, match="about none of the 20 images"):
        read_attributes(write(tmp_path, f"name,x\n{left_out},1\n"), drawn)
    with pytest.raises(DataError, match=r"cannot be read .*UTF-8"):
        read_attributes(tmp_path / "missing.csv", drawn)
    (tmp_path / "bytes.csv").write_bytes(b"name,x\n0,\xff\n")
    with pytest.raises(DataError, match=r"cannot be read .*UTF-8"):
        read_attributes(tmp_path / "bytes.csv", drawn)


def test_many_numbers_become_thirds_and_few_stay_categories() -> None:
    cells = [str(value) for value in np.random.default_rng(0).permutation(90)] + [""]
    attribute = as_attribute("age", cells)
    assert attribute.categories == ["lowest third", "middle third", "highest third"]
    assert np.bincount(attribute.values_N[:-1]).tolist() == [30, 30, 30] and attribute.values_N[-1] == -1
    order = np.array([int(cell) for cell in cells[:-1]])
    assert order[attribute.values_N[:-1] == 0].max() < order[attribute.values_N[:-1] == 1].min()
    assert as_attribute("count", ["10", "2", "1", "2"]).categories == ["1", "2", "10"]
    text = [f"town {number}" for number in range(12)]
    assert len(as_attribute("town", text).categories) == 12
    mostly = as_attribute("mostly 0", ["0"] * 80 + [str(n) for n in range(1, 20)])
    assert len(mostly.categories) == 2  # equal numbers are not parted


def test_what_the_files_betray(source: FolderSource) -> None:
    drawn = draw(source, 30, seed=0)
    found = {attribute.name: attribute for attribute in image_attributes(drawn)}
    assert list(found) == ["pixels in the file", "width / height", "mean brightness", "bytes of the file"]
    brightness = [np.asarray(Image.open(source.name(i)).convert("L"), float).mean() for i in range(30)]
    assert np.corrcoef(found["mean brightness"].values_N, brightness)[0, 1] > 0.8
    sizes = np.array([Path(source.name(i)).stat().st_size for i in range(30)])
    bytes_of = found["bytes of the file"].values_N
    assert sizes[bytes_of == 0].max() < sizes[bytes_of == 2].min()
    areas = np.prod(source.sizes(np.arange(30)), axis=0)
    of_area = found["pixels in the file"].values_N
    assert areas[of_area == 0].max() < areas[of_area == 2].min()


def test_images_stored_as_pixels_have_no_bytes(source: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawn, "pixels", lambda self, index: np.full((4, 5, 3), 9 * index, np.uint8))
    monkeypatch.setattr(
        Drawn, "sizes", lambda self, indices: (np.full(len(indices), 4), np.full(len(indices), 5))
    )
    found = image_attributes(draw(source, 20, seed=0))
    assert found[0].categories == ["20"] and found[3].categories == []
    assert (found[3].values_N == -1).all()
