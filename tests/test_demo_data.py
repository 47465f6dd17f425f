"""Promises of `tools.demo_data`: reproducible, varied, and with classes that only the pattern tells."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from eval.config import KnnConfig
from eval.knn import knn_accuracy
from pipelines.errors import DataError
from tools.demo_data import PATTERNS, draw_jpeg, make_demo_images


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def draw(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` images of each class as flat rows of 32 x 32 RGB pixels around 0, and their labels."""
    rows, labels = [], []
    for label, pattern in enumerate(PATTERNS):
        for i in range(count):
            image = Image.open(io.BytesIO(draw_jpeg(pattern, np.random.default_rng([seed, label, i]))))
            rows.append(np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float32).ravel())
            labels.append(label)
    return torch.from_numpy(np.stack(rows)) - 128, torch.tensor(labels)


def test_same_seed_draws_the_same_files_whatever_the_workers(tmp_path: Path) -> None:
    make_demo_images(tmp_path / "one", seed=3, per_class_train=3, per_class_val=2, workers=1)
    make_demo_images(tmp_path / "two", seed=3, per_class_train=3, per_class_val=2, workers=2)
    make_demo_images(tmp_path / "other", seed=4, per_class_train=3, per_class_val=2, workers=2)
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one == contents(tmp_path / "two")
    assert len(one) == len(set(one.values())) == 5 * len(PATTERNS)
    assert not set(one.values()) & set(other.values())


def test_images_lie_in_an_image_folder_of_varied_sizes(tmp_path: Path) -> None:
    make_demo_images(tmp_path / "out", per_class_train=4, per_class_val=2)
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}
    for split, count in (("train", 4), ("val", 2)):
        images = ImageFolder(str(tmp_path / "out" / split))
        assert images.classes == list(PATTERNS)
        assert len(images.classes) >= 10
        assert np.bincount(images.targets).tolist() == [count] * len(PATTERNS)
        pictures = [image for image, _ in images]
        assert {Image.open(path).format for path, _ in images.samples} == {"JPEG"}
        sides = np.array([picture.size for picture in pictures])
        assert 72 <= sides.min() <= sides.max() <= 128
        assert len({tuple(side) for side in sides.tolist()}) > len(pictures) / 2
        assert min(np.asarray(picture, dtype=float).std() for picture in pictures) > 10


def test_raw_pixels_and_mean_colours_say_little_about_the_class() -> None:
    train_ND, train_labels_N = draw(seed=0, count=40)
    test_ND, test_labels_N = draw(seed=1, count=20)
    config = KnnConfig(k=20)
    chance = 1 / len(PATTERNS)
    pixels = knn_accuracy(train_ND, train_labels_N, test_ND, test_labels_N, config)
    colours = knn_accuracy(
        *(
            train_ND.view(-1, 1024, 3).mean(1),
            train_labels_N,
            test_ND.view(-1, 1024, 3).mean(1),
            test_labels_N,
        ),
        config,
    )
    # A share has a standard deviation of about sqrt(p / 240) here: 0.019 for p = chance = 1/12.
    assert pixels < 0.3
    assert colours < chance + 0.08


def test_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="already exists"):
        make_demo_images(tmp_path / "out")
    assert contents(tmp_path) == {}


def test_folder_that_cannot_be_written_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written to") as caught:
        make_demo_images(tmp_path / "file" / "out", per_class_train=1, per_class_val=1)
    assert "\n" not in str(caught.value)
