"""Any torchvision dataset of images on disk is a source; one that is not there is one sentence."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision.datasets import VisionDataset

from pipelines.config import DataConfig
from pipelines.errors import DataError
from pipelines.source import TorchvisionSource, open_source, read_image


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few random images in CIFAR-10's own files, whose checksums are not looked at."""
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(1)
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        count = 3 if name == "test_batch" else 2
        pixels = rng.integers(0, 256, (count, 3072), np.uint8)
        batch = {"data": pixels, "labels": rng.integers(0, 10, count).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = [f"class {label}" for label in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, _=None: Path(path).exists()
    )
    return tmp_path


@pytest.mark.parametrize(("split", "train"), [("", True), (":train", True), (":test", False)])
def test_cifar_is_what_torchvision_gives(split: str, train: bool, cifar: Path) -> None:
    theirs = torchvision.datasets.CIFAR10(cifar, train=train)
    ours = open_source(DataConfig(path=f"torchvision:CIFAR10:{cifar}{split}").path)
    assert isinstance(ours, TorchvisionSource) and ours.holds_raw
    assert len(ours) == len(theirs) == (10 if train else 3)
    assert ours.classes == theirs.classes
    assert ours.labels_N.tolist() == theirs.targets
    assert ours.labels(np.array([2, 0])).tolist() == [theirs.targets[2], theirs.targets[0]]
    for index, (image, _) in enumerate(theirs):
        np.testing.assert_array_equal(ours.pixels(index), np.asarray(image))
        np.testing.assert_array_equal(np.asarray(read_image(ours, index)), np.asarray(image))
    assert [side.tolist() for side in ours.sizes(np.array([1, 2]))] == [[32, 32], [32, 32]]
    with pytest.raises(DataError, match=r"sample 1 of torchvision:CIFAR10:.*set data\.loader to folder"):
        ours.encoded(1)


def test_datasets_that_are_not_there_are_explained(tmp_path: Path) -> None:
    cases = {
        f"CIFAR10:{tmp_path}": r"cannot open .*CIFAR10.* \(Dataset not found.*\); put the dataset",
        f"Food101:{tmp_path}": r"torchvision cannot open .*Food101",
        f"ImageFolder:{tmp_path}": r"torchvision cannot open .*ImageFolder.*class folder",
        f"CocoDetection:{tmp_path}": r"torchvision cannot open .*annFile",
        f"STL10:{tmp_path}:tests": r"torchvision cannot open .*split",
        f"CIFAR10:{tmp_path}:val": r"CIFAR10 of torchvision has no split 'val' \(train or test to choose\)",
        f"EuroSAT:{tmp_path}:test": r"EuroSAT of torchvision has no split 'test' \(none to choose\)",
        f"NoSuch:{tmp_path}": r"torchvision\.datasets has no NoSuch to read from a folder",
        f"os:{tmp_path}": r"torchvision\.datasets has no os",
        "FakeData:x": r"torchvision\.datasets has no FakeData to read from a folder",
        "CIFAR10": r"write torchvision:NAME:ROOT or torchvision:NAME:ROOT:SPLIT",
        "": r"write torchvision:NAME:ROOT",
        f"CIFAR10:{tmp_path}:test:x": r"write torchvision:NAME:ROOT",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message) as error:
            open_source(Path(f"torchvision:{name}"))
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []  # nothing was downloaded


class Fake(VisionDataset):
    """Gives 16-bit and grayscale images, alone; what it raises and its labels are set from outside."""

    labels: object = None
    error: Exception | None = None
    sample: object = Image.fromarray(np.full((2, 3), 0x1234, np.uint16))

    def __init__(self, root: str, image_set: str = "some") -> None:
        super().__init__(root)
        self.image_set = image_set

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> object:
        if index == 3 and self.error is not None:
            raise self.error
        return self.sample


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr("torchvision.datasets.Fake", Fake, raising=False)
    monkeypatch.setattr("torchvision.datasets.__all__", ("Fake",))
    for name in ("labels", "error", "sample"):
        monkeypatch.setattr(Fake, name, getattr(Fake, name))
    return Fake


@pytest.mark.parametrize("labels", [None, [-1] * 4, [0, 1], [0.5] * 4, [[0], [1], [2], [3]], ["a"] * 4])
def test_what_is_not_one_label_per_image_is_none(labels: object, fake: type[Fake]) -> None:
    fake.labels = labels
    source = open_source(Path("torchvision:Fake:x:other"))
    assert source._dataset.image_set == "other"
    assert source.classes == [] and source.labels_N.tolist() == [0] * 4
    assert source.pixels(1).tolist() == [[[0x12] * 3] * 3] * 2  # as all sources take 16 bits


def test_labels_without_names_are_numbered(fake: type[Fake]) -> None:
    fake.labels = np.array([2, 0, 0, 1], np.uint8)
    source = open_source(Path("torchvision:Fake:x"))
    assert (source.classes, source.labels_N.tolist()) == (["0", "1", "2"], [2, 0, 0, 1])
    assert source.labels_N.dtype == np.int64


@pytest.mark.parametrize("error", [KeyError("k"), RuntimeError("two\nlines"), FileNotFoundError(2, "Gone")])
def test_images_that_cannot_be_read_are_named(error: Exception, fake: type[Fake]) -> None:
    fake.error = error
    source = open_source(Path("torchvision:Fake:x"))
    for read in (lambda: read_image(source, 3), lambda: source.sizes(np.array([0, 3]))):
        with pytest.raises(DataError, match=r"sample 3 of torchvision:Fake:x cannot be read \(.+\)"):
            read()
    assert read_image(source, 2).size == (3, 2)


@pytest.mark.parametrize("sample", [3, (None, 2), np.zeros((2, 2, 3), np.uint8)])
def test_datasets_without_images_are_refused(sample: object, fake: type[Fake]) -> None:
    fake.sample = sample
    with pytest.raises(DataError, match=r"sample 0 of torchvision:Fake:x .*it is no image but a"):
        open_source(Path("torchvision:Fake:x"))
