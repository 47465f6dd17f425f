"""Data sets in their makers' layout: the samples as listed, and a sentence for what is amiss."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import DataError
from pipelines.source import open_source, read_image
from pipelines.source.voc import VOC_CLASSES, Voc07Source
from tests.dataset_trees import (
    INAT_CATEGORIES,
    PLACES_FOLDERS,
    PLACES_IMAGES,
    write_inat,
    write_places,
    write_voc,
)
from tools.convert.convert import convert

BOX = (5, 5, 30, 30)
VOC_PARTS = {
    "trainval": {
        "000005": [("chair", False, BOX), ("chair", True, BOX), ("person", True, BOX)],
        "000007": [("car", False, BOX)],
        "009961": [],
    },
    "test": {"000001": [("dog", False, BOX), ("person", False, BOX)]},
}


@pytest.fixture
def places(tmp_path: Path) -> Path:
    write_places(tmp_path / "places")
    return tmp_path / "places"


@pytest.fixture
def inat(tmp_path: Path) -> Path:
    write_inat(tmp_path / "inat")
    return tmp_path / "inat"


def labelled_names(spec: str) -> list[tuple[str, str]]:
    """(file, class) of each sample, and every image can be read in its stated size."""
    source = open_source(Path(spec))
    for index in range(len(source)):
        read_image(source, index)
    return [(source.name(i), source.classes[label]) for i, label in enumerate(source.labels_N)]


@pytest.mark.parametrize(("part", "per_class"), [("train", 4), ("val", 2)])
def test_places_are_the_lines_of_the_list(places: Path, part: str, per_class: int) -> None:
    lines = (places / f"trainvalsplit_places205/{part}_places205.csv").read_text().split("\n")[:-1]
    listed = [(str(places / PLACES_IMAGES / n), PLACES_FOLDERS[int(k)]) for n, k in map(str.split, lines)]
    assert len(listed) == 3 * per_class
    assert labelled_names(f"places205:{places}:{part}") == listed


def test_without_a_part_it_is_the_training_images(places: Path, inat: Path) -> None:
    for spec in (f"places205:{places}", f"inat18:{inat}"):
        assert labelled_names(spec) == labelled_names(f"{spec}:train")


@pytest.mark.parametrize(("part", "per_class"), [("train", 4), ("val", 2)])
def test_inat_images_have_the_category_of_their_annotation(inat: Path, part: str, per_class: int) -> None:
    content = json.loads((inat / f"{part}2018.json").read_text())
    category_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
    listed = [
        (str(inat / entry["file_name"]), INAT_CATEGORIES[category_of[entry["id"]]])
        for entry in content["images"]
    ]
    assert len(listed) == 3 * per_class
    assert labelled_names(f"inat18:{inat}:{part}") == listed


def test_published_layouts_convert(places: Path, tmp_path: Path) -> None:
    spec = f"places205:{places}:val"
    convert(Path(spec), tmp_path / "val.beton", workers=1)
    ours, source = open_source(tmp_path / "val.beton"), open_source(Path(spec))
    assert ours.classes == source.classes
    assert ours.labels_N.tolist() == source.labels_N.tolist()
    for index in range(len(source)):
        assert ours.encoded(index).tobytes() == source.encoded(index).tobytes()


def rewritten(file: Path, change: Callable[[str], str]) -> None:
    file.write_text(change(file.read_text()))


def refusal(spec: str) -> str:
    with pytest.raises(DataError, match=r"^[^\n]*[^.\n]\.$") as refused:
        open_source(Path(spec))
    return str(refused.value)


def test_what_is_amiss_with_places_is_one_sentence(places: Path) -> None:
    lists = places / "trainvalsplit_places205"
    train, val = lists / "train_places205.csv", lists / "val_places205.csv"
    spec = f"places205:{places}:val"
    good_train, good_val = train.read_text(), val.read_text()
    val.write_text(good_val.replace(" 2\n", " 3\n"))
    assert "label 3" in refusal(spec)
    val.write_text(good_val.replace(" 2\n", " 0\n"))  # another order of the classes
    assert "y/yard" in refusal(spec) and "label 0" in refusal(spec)
    val.write_text(good_val + "a/abbey/x.jpg -1\n")
    assert "Line 7" in refusal(spec)
    val.write_text(good_val + "a/abbey/x.jpg 0\n")
    assert "1 of the 7 images" in refusal(spec) and "a/abbey/x.jpg" in refusal(spec)
    val.write_text("")
    assert "is empty" in refusal(spec)
    val.unlink()
    assert f"{val} are missing" in refusal(spec)
    train.write_text(good_train.replace(" 1\n", " 5\n"))
    assert "no image with label 1" in refusal(f"places205:{places}")
    assert "names no part" in refusal(f"places205:{places}:test")
    assert "names no part" in refusal("places205:")


def test_what_is_amiss_with_inat_is_one_sentence(inat: Path) -> None:
    file, spec = inat / "train2018.json", f"inat18:{inat}"
    good = json.loads(file.read_text())

    def refusal_with(**changed: object) -> str:
        file.write_text(json.dumps(good | changed))
        return refusal(spec)

    first, *others = good["annotations"]
    assert "with category 99" in refusal_with(annotations=[first | {"category_id": 99}, *others])
    assert "image 12345" in refusal_with(annotations=[first | {"image_id": 12345}, *others])
    assert "a second time" in refusal_with(annotations=[first, first, *others])
    assert "12 images, but 11 annotations" in refusal_with(annotations=others)
    assert "'category_id'" in refusal_with(annotations=[{"image_id": 1}])
    assert "'id'" in refusal_with(images=[{}])
    assert "invalid literal" in refusal_with(annotations=[first | {"image_id": "a"}])
    file.write_text("{")
    assert "is not JSON" in refusal(spec)
    file.write_text("[]")
    assert "is not a JSON object" in refusal(spec)
    file.write_text(json.dumps(good))
    (inat / good["images"][3]["file_name"]).unlink()
    assert "1 of the 12 images" in refusal(spec) and good["images"][3]["file_name"] in refusal(spec)
    file.unlink()
    assert f"{file} are missing" in refusal(spec)


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "annotations alone"])
def test_voc_tells_present_difficult_and_absent_apart(tmp_path: Path, lists: bool) -> None:
    write_voc(tmp_path, VOC_PARTS, lists=lists)
    expected = np.full((3, 20), -1)
    expected[0, VOC_CLASSES.index("chair")] = 1  # one of two chairs is difficult
    expected[0, VOC_CLASSES.index("person")] = 0
    expected[1, VOC_CLASSES.index("car")] = 1
    for devkit in (tmp_path, tmp_path / "VOC2007"):
        source = Voc07Source(devkit, "trainval")
        assert source.presence_NC.tolist() == expected.tolist()
    assert [Path(source.name(i)).name for i in range(3)] == ["000005.jpg", "000007.jpg", "009961.jpg"]
    read_image(source, 2)
    assert Voc07Source(tmp_path, "test").presence_NC.tolist()[0].count(1) == 2


def test_what_is_amiss_with_voc_is_one_sentence(tmp_path: Path) -> None:
    def refusal(part: str = "trainval", devkit: Path = tmp_path) -> str:
        with pytest.raises(DataError, match=r"^[^\n]*[^.\n]\.$") as refused:
            Voc07Source(devkit, part)
        return str(refused.value)

    assert "holds no folder VOC2007" in refusal()
    write_voc(tmp_path / "other", VOC_PARTS, year="VOC2012")
    assert "holds VOC2012, not VOC2007" in refusal(devkit=tmp_path / "other")
    assert "not VOC2007" in refusal(devkit=tmp_path / "other" / "VOC2012")
    write_voc(tmp_path, VOC_PARTS)
    sets = tmp_path / "VOC2007" / "ImageSets" / "Main"
    assert "val.txt is missing" in refusal("val")
    good = (sets / "cat_trainval.txt").read_text()
    (sets / "cat_trainval.txt").write_text(good.replace("000007 -1", "000007  2"))
    assert "label '2' for image 000007" in refusal()
    (sets / "cat_trainval.txt").write_text(good.replace("000007 -1\n", ""))
    assert "does not list the images of its part" in refusal()
    (sets / "cat_trainval.txt").unlink()
    xml = tmp_path / "VOC2007" / "Annotations" / "000005.xml"
    good = xml.read_text()
    xml.write_text(good.replace("<name>chair", "<name>throne"))
    assert "'throne'" in refusal()
    xml.write_text(good[:-20])
    assert "is not XML" in refusal()
    xml.write_text(good)
    (tmp_path / "VOC2007" / "JPEGImages" / "000007.jpg").unlink()
    assert "1 of the 3 images" in refusal()
    (sets / "trainval.txt").write_text("2008_000002\n")
    assert "2008_000002, which is no image of 2007" in refusal()
