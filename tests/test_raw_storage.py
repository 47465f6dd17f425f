"""Datasets with raw pixels load as those with JPEG files do; datasets without labels open."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from pipelines.config import DataConfig
from pipelines.errors import DataError
from pipelines.loaders import build_loader
from pipelines.source import open_source, read_image
from pipelines.threads import keep_torch_threads


@pytest.fixture(scope="module")
def images(image_folder: Path) -> list[np.ndarray]:
    return [np.asarray(image.convert("RGB")) for image, _ in ImageFolder(str(image_folder))]


@pytest.fixture(scope="module")
def mixed(images: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As FFCV writes them: images of more than 150,000 bytes as JPEG, the others raw."""
    with keep_torch_threads():
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        path = tmp_path_factory.mktemp("raw") / "x.beton"
        fields = {"image": RGBImageField(write_mode="smart", smart_threshold=150_000), "label": IntField()}
        samples = [(image, label % 3) for label, image in enumerate(images)]
        DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(samples)
    return path


def test_raw_pixels_are_read_exactly(mixed: Path, images: list[np.ndarray]) -> None:
    source = open_source(mixed)
    is_raw = [image.nbytes <= 150_000 for image in images]
    assert 3 < sum(is_raw) < len(images) - 3
    assert source.holds_raw
    for index, image in enumerate(images):
        assert read_image(source, index).size == (image.shape[1], image.shape[0])
        if is_raw[index]:
            assert np.array_equal(np.asarray(read_image(source, index)), image)
            with pytest.raises(DataError, match=f"sample {index} of .* is stored as raw pixels"):
                source.encoded(index)
        else:
            assert source.pixels(index) is None
            assert bytes(source.encoded(index)[:2]) == b"\xff\xd8"


def test_compiled_loader_takes_raw_pixels_and_jpeg_files(mixed: Path) -> None:
    batches = {}
    for name in ("folder", "ffcv"):
        config = DataConfig(path=mixed, loader=name, image_size=40, workers=0 if name == "folder" else 2)
        with closing(build_loader(config, seed=3, batch_size=8)) as loader:
            batches[name] = list(loader.epoch(0))
    for ours, reference in zip(batches["ffcv"], batches["folder"], strict=True):
        assert ours.indices_N.tolist() == reference.indices_N.tolist()
        assert torch.equal(ours.views_VNHWC, reference.views_VNHWC)


def test_dali_says_that_it_does_not_read_raw_pixels(mixed: Path) -> None:
    config = DataConfig(path=mixed, loader="dali", image_size=40)
    with pytest.raises(DataError, match=r"holds raw pixels; set data\.loader to ffcv or folder"):
        build_loader(config, seed=3, batch_size=8)


@pytest.mark.parametrize("field", ["width", "mode"])
def test_raw_pixels_of_another_size_are_damage(field: str, mixed: Path, tmp_path: Path) -> None:
    from ffcv.reader import Reader

    path = Path(shutil.copy(mixed, tmp_path / "x.beton"))
    reader = Reader(str(path))
    metadata = reader.metadata.copy()
    raw = int(np.flatnonzero(metadata["f0"]["mode"] == 1)[0])
    metadata["f0"][field][raw] += 1
    start = path.read_bytes().index(reader.metadata.tobytes())
    with path.open("r+b") as file:
        file.seek(start)
        file.write(metadata.tobytes())
    with pytest.raises(DataError, match="raw images are not of their size"):
        open_source(path)


def test_dataset_without_labels_has_no_classes(tmp_path: Path, beton: Path) -> None:
    path = Path(shutil.copy(beton, tmp_path / "x.beton"))
    manifest = tmp_path / "x.manifest.json"
    manifest.write_text(json.dumps({"classes": [], "images": 24, "unlabelled": True}))
    assert open_source(path).classes == []
    assert isinstance(read_image(open_source(path), 0), Image.Image)
    manifest.write_text(json.dumps({"classes": [], "images": 24, "unlabelled": False}))
    with pytest.raises(DataError, match="names too few classes"):
        open_source(path)
