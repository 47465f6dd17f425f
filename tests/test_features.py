"""Frozen features: the authors' evaluation images, in the order of the dataset, each exactly once."""

import multiprocessing
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from eval.config import FeaturesConfig
from eval.features import extract_features, extract_share
from model.backbones import build_backbone
from model.errors import ModelError
from model.weights import Normalisation
from pipelines.errors import DataError
from pipelines.source import FolderSource
from tests.evaluations import MemoryKeeper, StoppedError, stop_after
from tools.work_folder import WorkFolder
from train.preemption import StopRequest

CONFIG = FeaturesConfig(image_size=32, resize=36, batch_size=8, workers=0)


class Flatten(nn.Module):
    """A backbone whose features are the pixels it is given."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.flatten(1)


class Broken(nn.Module):
    def forward(self, images_NCHW: Tensor) -> Tensor:
        raise RuntimeError("a bug")


def evaluation_images(folder: Path, resize: int, size: int, mean: tuple, std: tuple) -> tuple[Tensor, Tensor]:
    """(N, 3, size, size) and labels as torchvision's own classes and the authors' evaluate.py make them."""
    steps = [transforms.Resize(resize), transforms.CenterCrop(size), transforms.ToTensor()]
    dataset = ImageFolder(folder, transforms.Compose([*steps, transforms.Normalize(mean, std)]))
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, write_images: Callable) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, ["a", "b", "c"], per_class=7)  # 21 images: two full batches of 8 and a part
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_backbone_sees_the_authors_evaluation_images_in_order(images: Path, workers: int) -> None:
    config = CONFIG.model_copy(update={"workers": workers})
    statistics = Normalisation((0.3, 0.4, 0.5), (0.2, 0.3, 0.4))
    features, labels = extract_features(
        Flatten(), FolderSource(images), config, "cpu", normalisation=statistics
    )
    expected, expected_labels = evaluation_images(images, 36, 32, *statistics)
    assert torch.equal(features, expected.flatten(1))
    assert torch.equal(labels, expected_labels)
    assert (features.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_real_images_become_the_authors_evaluation_images(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "imagenet-sample.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "train"
    config = FeaturesConfig(batch_size=50, workers=2)
    features, labels = extract_features(Flatten(), FolderSource(folder), config, "cpu")
    expected, expected_labels = evaluation_images(
        folder, 256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    assert torch.equal(features, expected.flatten(1))
    assert torch.equal(labels, expected_labels)


def test_network_runs_in_evaluation_mode_and_is_not_changed(images: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", small_stem=True).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    features, _ = extract_features(backbone, FolderSource(images), CONFIG, "cpu")
    assert features.shape == (21, 512)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())

    one_by_one, _ = extract_features(
        backbone, FolderSource(images), CONFIG.model_copy(update={"batch_size": 1}), "cpu"
    )
    torch.testing.assert_close(features, one_by_one, rtol=1e-4, atol=1e-5)


def test_features_can_train_a_classifier(images: Path) -> None:
    features, labels = extract_features(Flatten(), FolderSource(images), CONFIG, "cpu")
    classifier = nn.Linear(features.shape[1], 3)
    nn.functional.cross_entropy(classifier(features), labels).backward()
    assert classifier.weight.grad is not None


def test_progress_counts_to_the_number_of_images(images: Path) -> None:
    calls: list[tuple[int, int]] = []
    extract_features(Flatten(), FolderSource(images), CONFIG, "cpu", lambda *call: calls.append(call))
    assert calls == [(8, 21), (16, 21), (21, 21)]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_is_one_sentence_with_its_name(
    tmp_path: Path, write_images: Callable, workers: int
) -> None:
    write_images(tmp_path / "images", ["a", "b"], per_class=6)
    bad = tmp_path / "images" / "b" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    config = CONFIG.model_copy(update={"workers": workers})
    with pytest.raises(DataError, match=rf"^[^\n]*{bad}[^\n]*\.$"):
        extract_features(Flatten(), FolderSource(tmp_path / "images"), config, "cpu")


def test_killed_worker_is_one_sentence(images: Path) -> None:
    def kill_workers(done: int, total: int) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    config = CONFIG.model_copy(update={"workers": 2, "batch_size": 1})
    with pytest.raises(DataError, match=r"^A worker process [^\n]*eval\.features\.workers[^\n]*\.$"):
        extract_features(Flatten(), FolderSource(images), config, "cpu", kill_workers)


def test_errors_of_the_backbone_are_not_taken_for_dead_workers(images: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        extract_features(Broken(), FolderSource(images), CONFIG, "cpu")


def test_diverged_backbone_is_an_error(images: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", small_stem=True)
    backbone.conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="not all finite"):
        extract_features(backbone, FolderSource(images), CONFIG, "cpu")


def test_extraction_goes_on_after_the_last_finished_block(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.features.BLOCK_IMAGES", 6)  # batches of 4 and 2
    config = CONFIG.model_copy(update={"batch_size": 4})
    keeper, calls = MemoryKeeper(), []
    with pytest.raises(StoppedError):  # in the third block
        extract_features(Flatten(), FolderSource(images), config, "cpu", stop_after(5), keeper=keeper)
    assert keeper.kept.keys() == {"features-0-6", "features-6-12"}
    seen: list[int] = []

    class Seeing(Flatten):
        def forward(self, images_NCHW: Tensor) -> Tensor:
            seen.append(len(images_NCHW))
            return super().forward(images_NCHW)

    found, labels = extract_features(
        Seeing(), FolderSource(images), config, "cpu", lambda *call: calls.append(call), keeper=keeper
    )
    assert seen == [4, 2, 3]
    assert calls == [(6, 21), (12, 21), (16, 21), (18, 21), (21, 21)]
    whole, expected_labels = extract_features(Flatten(), FolderSource(images), CONFIG, "cpu")
    assert torch.equal(found, whole) and torch.equal(labels, expected_labels)
    share = extract_share(Broken(), FolderSource(images), config, "cpu", keeper=keeper)  # all is there
    assert torch.equal(share.features_nF, whole) and (share.start, share.total) == (0, 21)


def test_work_folder_keeps_what_is_whole_and_is_gone_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, value = tmp_path / "x.work" / "key", {"features": torch.arange(6.0), "step": 3}
    keeper = WorkFolder(folder, StopRequest())
    assert keeper.load("block") is None and not folder.exists()
    keeper.save("block", value)
    assert torch.equal(keeper.load("block")["features"], value["features"])
    path = folder / "block.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert keeper.load("block") is None
    assert f"{path} cannot be read" in caplog.text
    keeper.remove()
    assert list(tmp_path.iterdir()) == []
    assert not keeper.is_due and WorkFolder(folder, StopRequest(signal=15)).is_due


def test_work_goes_on_where_it_cannot_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    keeper = WorkFolder(tmp_path / "file" / "key", StopRequest())
    keeper.save("block", 1)
    keeper.save("block", 2)
    assert caplog.text.count("Cannot keep unfinished work") == 1
    keeper.remove()


def test_crop_larger_than_the_resized_image_is_a_config_error() -> None:
    with pytest.raises(ValidationError, match="resize must be at least image_size, but they are 32 and 64"):
        FeaturesConfig(image_size=64, resize=32)
