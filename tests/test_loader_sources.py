"""Loaders read shards, unlabelled images, torchvision's datasets and images of any size as PIL would."""

import pickle
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image

from pipelines.batch import Batch, Loader
from pipelines.config import DataConfig
from pipelines.errors import DataError
from pipelines.loaders import build_loader
from tools.convert import convert


def build(path: Path | str, name: str, batch: int = 8, size: int = 48) -> Loader:
    config = DataConfig(path=path, loader=name, image_size=size, workers=1, on_bad_sample="stop")
    return build_loader(config, seed=5, batch_size=batch)


def batches_of(path: Path | str, name: str, **settings: int) -> list[Batch]:
    with closing(build(path, name, **settings)) as loader:
        return [batch for epoch in range(2) for batch in loader.epoch(epoch)]


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices_N, b.indices_N) and torch.equal(a.labels_N, b.labels_N)
        assert torch.equal(a.params.box_VN4, b.params.box_VN4)
        assert torch.equal(a.views_VNHWC, b.views_VNHWC)


@pytest.fixture(scope="module")
def converted(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as `x.beton` and, in the folder `shards`, as three WebDataset shards."""
    folder = tmp_path_factory.mktemp("converted")
    convert(image_folder, folder / "x.beton", workers=1)
    convert(image_folder, folder / "shards", workers=1, shards=3)
    return folder


@pytest.mark.parametrize("name", ["folder", "dali"])
def test_shards_give_the_batches_of_the_beton(name: str, converted: Path) -> None:
    """In the same order, too: they are fewer than are shuffled together."""
    expected = batches_of(converted / "x.beton", "folder")
    assert {label for batch in expected for label in batch.labels_N.tolist()} == {0, 1, 2}
    assert_equal(batches_of(converted / "shards", name), expected)


@pytest.mark.parametrize("name", ["folder", "dali", "ffcv"])
def test_images_without_labels_have_label_0(name: str, image_folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in image_folder.glob("*/*.jpg"):
        shutil.copy(path, flat)
    expected = batches_of(flat, "folder")
    assert all(not batch.labels_N.any() for batch in expected)
    data = flat
    if name == "ffcv":
        convert(flat, tmp_path / "flat.beton", workers=1)
        data = tmp_path / "flat.beton"
    assert_equal(batches_of(data, name), expected)


@pytest.mark.parametrize("name", ["folder", "dali", "ffcv"])
def test_images_of_any_size_are_those_of_pil(name: str, tmp_path: Path) -> None:
    """1 x 1, very wide, very high, and one pixel thin."""
    folder, random = tmp_path / "images" / "c", np.random.default_rng(11)
    folder.mkdir(parents=True)
    for number, (width, height) in enumerate([(1, 1), (20_000, 3), (3, 20_000), (1, 50), (50, 1), (33, 47)]):
        coarse = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.BICUBIC).save(folder / f"{number}.jpg", quality=95)
    data = tmp_path / "images"
    expected = batches_of(data, "folder", batch=3)
    if name == "ffcv":
        data = tmp_path / "x.beton"
        images = [(np.asarray(Image.open(folder / f"{number}.jpg")), 0) for number in range(6)]
        fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
        DatasetWriter(str(data), fields, num_workers=1).from_indexed_dataset(images)
    assert_equal(batches_of(data, name, batch=3), expected)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """CIFAR-10 as torchvision finds it, of 20 images, but for the files' checksums."""
    folder, random = tmp_path / "cifar-10-batches-py", np.random.default_rng(4)
    folder.mkdir()
    for name in [f"data_batch_{number}" for number in range(1, 6)]:
        data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [3, 1, 4, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    return tmp_path


def test_torchvisions_datasets_are_read_where_they_lie(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    batches = batches_of(f"torchvision:CIFAR10:{cifar}", "folder", batch=4, size=32)
    labels = torch.cat([batch.labels_N for batch in batches[:5]])
    indices = torch.cat([batch.indices_N for batch in batches[:5]])
    assert sorted(indices.tolist()) == list(range(20))
    assert labels.tolist() == [[3, 1, 4, 1][index % 4] for index in indices.tolist()]


@pytest.mark.parametrize("name", ["dali", "ffcv"])
def test_datasets_without_files_are_for_the_folder_loader(
    name: str, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    with pytest.raises(DataError, match="folder"):
        batches_of(f"torchvision:CIFAR10:{cifar}", name)
