"""Samples that cannot be read: others take their places, the same ones everywhere, or the run stops."""

import logging
import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.bad_samples import BadSamples
from pipelines.batch import Batch, Loader
from pipelines.config import DataConfig
from pipelines.errors import DataError
from pipelines.loaders import LOADERS, build_loader
from pipelines.order import epoch_permutation
from pipelines.source import open_source

SEED, BATCH, SIZE = 5, 8, 48
REAL = [name for name in LOADERS if name != "synthetic"]
FAULTS = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "no image": lambda path: path.write_bytes(b"not an image" * 50),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "vanished": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def build(path: Path, name: str, **settings: object) -> Loader:
    config = DataConfig(**{"path": path, "loader": name, "image_size": SIZE, "workers": 2, **settings})
    return build_loader(config, seed=SEED, batch_size=BATCH)


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_folder, tmp_path / "images"))


def file(images: Path, index: int) -> Path:
    """Image `index` of the dataset: `image_folder` deals 24 images into three classes."""
    return images / ("ant", "bee", "cat")[index // 8] / f"{3 * (index % 8) + index // 8:02}.jpg"


def with_stand_ins(indices: np.ndarray, bad: set[int], count: int) -> list[int]:
    """The definition: the first readable one of index, index + 1, ... modulo the number of samples."""
    return [next(i % count for i in range(index, index + count) if i % count not in bad) for index in indices]


def test_stand_ins_are_the_next_good_samples_of_the_dataset() -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        count = int(random.integers(2, 40))
        bad = {int(i) for i in random.choice(count, random.integers(0, min(count, 9)), replace=False)}
        register = BadSamples(count, stop=False, log=False)
        for index in bad:
            register.report(index, DataError("The image cannot be read."))
        indices = random.permutation(count)
        assert register.stand_ins(indices).tolist() == with_stand_ins(indices, bad, count)


@pytest.mark.parametrize(("count", "allowed"), [(3, 2), (50, 8), (1000, 10)])
def test_too_many_bad_samples_stop_the_run(count: int, allowed: int) -> None:
    register = BadSamples(count, stop=False, log=False)
    for index in range(allowed):
        register.report(index, DataError(f"Image {index} is bad."))
        register.report(index, DataError(f"Image {index} is bad."))  # counts once
    expected = rf"{allowed + 1} of the dataset's {count} images .*Image {allowed}"
    for _ in range(2):  # and stop it again where it is started again
        with pytest.raises(DataError, match=expected):
            register.report(allowed, DataError(f"Image {allowed} is bad."))


@pytest.mark.timeout(180)
def test_dataset_without_a_readable_image_stops_every_time(tmp_path: Path) -> None:
    """There is none to look for as a stand-in."""
    (tmp_path / "c").mkdir()
    for number in range(3):
        (tmp_path / "c" / f"{number}.jpg").write_bytes(b"no image")
    config = DataConfig(path=tmp_path, loader="folder", workers=0)
    with closing(build_loader(config, seed=SEED, batch_size=2)) as loader:
        for _ in range(3):
            with pytest.raises(DataError, match=r"3 of the dataset's 3 images cannot be read"):
                list(loader.epoch(0))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["folder", "dali"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_loader_replaces_bad_files_by_the_same_others(
    name: str, fault: str, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is good while the folder is listed, and bad when it is read."""
    bad = {7, 8}
    with closing(build(images, name)) as loader, caplog.at_level(logging.WARNING, "pipelines"):
        for index in bad:
            FAULTS[fault](file(images, index))
        for epoch in range(2):
            expected = with_stand_ins(epoch_permutation(24, SEED, epoch), bad, 24)
            batches = list(loader.epoch(epoch))
            assert [i for batch in batches for i in batch.indices_N.tolist()] == expected
    assert set(loader.bad_samples) == bad
    assert caplog.text.count("takes its place") == len(bad)
    for index in bad:
        assert str(file(images, index)) in loader.bad_samples[index]


@pytest.mark.parametrize("name", ["folder", "dali"])
def test_stand_in_comes_with_its_own_pixels_numbers_and_label(name: str, images: Path) -> None:
    """As if the order had named it in the first place."""
    with closing(build(images, name)) as loader:
        file(images, 7).write_bytes(b"")
        batches = list(loader.epoch(0))
    stand_in, original = same_sample_twice(batches, 8)
    for tensor in ("views_VNHWC", "labels_N"):
        one, other = (getattr(batch, tensor) for batch, _ in (stand_in, original))
        axis = 1 if tensor == "views_VNHWC" else 0
        assert torch.equal(one.select(axis, stand_in[1]), other.select(axis, original[1]))
    for field in vars(batches[0].params):
        one, other = (getattr(batch.params, field)[:, n] for batch, n in (stand_in, original))
        assert torch.equal(one, other), field


def same_sample_twice(batches: list[Batch], index: int) -> list[tuple[Batch, int]]:
    found = [(batch, n) for batch in batches for n, i in enumerate(batch.indices_N.tolist()) if i == index]
    assert len(found) == 2
    return found


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["folder", "dali"])
@pytest.mark.parametrize("fault", FAULTS)
def test_run_stops_at_a_bad_file_where_it_is_told_to(name: str, fault: str, images: Path) -> None:
    with closing(build(images, name, on_bad_sample="stop")) as loader:
        FAULTS[fault](file(images, 7))
        with pytest.raises(DataError, match=r"ant/21\.jpg cannot be read") as caught:
            list(loader.epoch(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", REAL)
def test_image_that_pil_would_find_too_large_is_a_bad_sample(
    name: str, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other decoders would take it, and any amount of memory for it."""
    heights_N, widths_N = open_source(beton).sizes(np.arange(24))
    pixels_N = heights_N * widths_N
    monkeypatch.setattr("pipelines.sample_reader.MAX_PIXELS", np.sort(pixels_N)[-2])
    with closing(build(beton, name)) as loader:
        batches = list(loader.epoch(0))
    assert list(loader.bad_samples) == [pixels_N.argmax()]
    assert "pixels; make it smaller" in loader.bad_samples[pixels_N.argmax()]
    assert all(pixels_N.argmax() not in batch.indices_N for batch in batches)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_forbidden_file_is_a_bad_sample(images: Path) -> None:
    with closing(build(images, "folder", workers=0)) as loader:
        file(images, 7).chmod(0)
        list(loader.epoch(0))
    assert "Permission denied" in loader.bad_samples[7]


def test_source_gone_altogether_stops_the_run(images: Path) -> None:
    with closing(build(images, "folder", workers=0)) as loader:
        shutil.rmtree(images)
        with pytest.raises(DataError, match=r"9 of the dataset's 24 images cannot be read"):
            list(loader.epoch(0))


def test_order_of_the_files_is_the_one_that_these_tests_assume(images: Path) -> None:
    source = open_source(images)
    assert [source.name(i) for i in range(24)] == [str(file(images, i)) for i in range(24)]
