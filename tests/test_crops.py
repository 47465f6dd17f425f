"""Random crops: torchvision's, and a pure function of seed, epoch and sample."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from eval.config import FeaturesConfig
from eval.crops import RandomCrops, loading
from pipelines.errors import DataError
from pipelines.source import FolderSource

CONFIG = FeaturesConfig(image_size=24, resize=24, workers=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_images: Callable) -> FolderSource:
    folder = tmp_path_factory.mktemp("crops")
    write_images(folder, ["a", "b"], per_class=9)
    return FolderSource(folder)


def test_pixels_are_those_of_torchvisions_transforms(source: FolderSource) -> None:
    crops = RandomCrops(source, CONFIG, seed=3, epoch=1)
    boxes, flips = crops.draw(np.arange(len(source)))
    for index, (box, flip) in enumerate(zip(boxes, flips, strict=True)):
        image = tv.resized_crop(Image.open(source.name(index)), *map(int, box), [24, 24])
        expected = tv.pil_to_tensor(tv.hflip(image) if flip else image)
        assert torch.equal(crops[index], expected)
    assert 0 < flips.sum() < len(flips)


def test_boxes_are_distributed_as_torchvisions(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    image = Image.new("RGB", (90, 50))
    image.save(tmp_path / "a" / "0.png")
    source = FolderSource(tmp_path)
    drawn = [RandomCrops(source, CONFIG, 1, epoch).draw(np.zeros(1, np.int64)) for epoch in range(2000)]
    ours = np.concatenate([box for box, _ in drawn])
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4
    flips = np.concatenate([flip for _, flip in drawn])
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / 2000**0.5


def test_crops_depend_on_seed_epoch_and_sample_alone(source: FolderSource) -> None:
    def load(batches: list[list[int]], workers: int = 0, seed: int = 3, epoch: int = 1) -> torch.Tensor:
        config = CONFIG.model_copy(update={"workers": workers})
        with loading(RandomCrops(source, config, seed, epoch), batches, config, CPU) as found:
            return torch.cat(list(found))

    whole = load([list(range(18))])
    assert torch.equal(load([[5], [17, 0, 3]]), whole[[5, 17, 0, 3]])
    assert torch.equal(load([[5, 1], [2], [7]], workers=2), whole[[5, 1, 2, 7]])
    assert not torch.equal(load([list(range(18))], seed=4), whole)
    assert not torch.equal(load([list(range(18))], epoch=2), whole)


@pytest.mark.parametrize("damage", ["header", "pixels"])
def test_bad_image_is_one_sentence_with_its_name(tmp_path: Path, write_images: Callable, damage: str) -> None:
    write_images(tmp_path, ["a", "b"], per_class=3)
    bad = tmp_path / "b" / "1.jpg"
    bad.write_bytes(b"nothing" if damage == "header" else bad.read_bytes()[:700])
    crops = RandomCrops(FolderSource(tmp_path), CONFIG, 0, 0)
    with (
        pytest.raises(DataError, match=rf"^[^\n]*{bad}[^\n]*\.$"),
        loading(crops, [[0, 1], [3, 4]], CONFIG, CPU) as found,
    ):
        list(found)
