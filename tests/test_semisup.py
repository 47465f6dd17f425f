"""Fine-tuning on few labels: the authors' loop to the number, and which images it learns from."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from eval.classifier import KEPT
from eval.crops import CentreCrops, RandomCrops
from eval.semisup import semisup
from eval.subset import draw_subset, read_subset, subset_list
from pipelines.errors import DataError
from pipelines.order import epoch_permutation
from pipelines.source import FolderSource, Source
from tests.evaluations import STATISTICS, MemoryKeeper, StoppedError, stop_after, task_of, tiny_backbone

EPOCHS = 3
SETTINGS = {
    "semisup": {"epochs": EPOCHS, "batch_size": 4, "lr_backbone": 0.1, "lr_classifier": 1.0, "seed": 5}
}
SUBSET = np.array([1, 2, 5, 9, 10, 11, 14, 17, 18, 20])  # two batches of 4 and one of 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, write_images: Callable) -> tuple[FolderSource, ...]:
    folder = tmp_path_factory.mktemp("semisup")
    write_images(folder / "train", ["a", "b", "c"], per_class=7, seed=1)
    write_images(folder / "test", ["a", "b", "c"], per_class=5, seed=2)
    return FolderSource(folder / "train"), FolderSource(folder / "test")


class Labels(Source):
    """A dataset of labels alone."""

    def __init__(self, counts: list[int]) -> None:
        self.path, self.classes = Path("labels"), [f"class{label}" for label in range(len(counts))]
        self.labels_N = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))

    def __len__(self) -> int:
        return len(self.labels_N)

    sizes = encoded = name = None


UNNAMED = Labels([8, 8, 8])


def crops_of(crops: torch.utils.data.Dataset, indices: np.ndarray | range) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    images = (torch.stack([crops[int(index)] for index in indices]) / 255 - mean) / std
    return images.contiguous(memory_format=torch.channels_last)  # as the networks take them: equal rounding


def test_fine_tuning_is_the_authors_loop(sources: tuple) -> None:
    """--weights finetune with two rates; on crops that test_crops.py compares with torchvision's."""
    train, test = sources
    keeper = MemoryKeeper()
    task = task_of(*sources, SETTINGS, subset_K=SUBSET, keeper=keeper)
    figures = semisup(task)

    backbone = tiny_backbone().to(memory_format=torch.channels_last)
    classifier = nn.Linear(12, 3)
    classifier.weight.data.normal_(0, 0.01, generator=torch.Generator().manual_seed(5))
    classifier.bias.data.zero_()
    groups = [{"params": classifier.parameters(), "lr": 1.0}, {"params": backbone.parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    top1 = []
    for epoch in range(EPOCHS):
        crops = RandomCrops(train, task.config.features, 5, epoch)
        order = SUBSET[epoch_permutation(len(SUBSET), 5, epoch)]
        backbone.train()
        for batch in np.split(order, [4, 8]):
            logits = classifier(backbone(crops_of(crops, batch)))
            optimizer.zero_grad()
            cross_entropy(logits, torch.from_numpy(train.labels_N[batch])).backward()
            optimizer.step()
        scheduler.step()
        backbone.eval()
        with torch.no_grad():
            images = crops_of(CentreCrops(test, task.config.features), range(len(test)))
            predicted = classifier(backbone(images)).argmax(1).numpy()
        top1.append((predicted == test.labels_N).mean())

    state = keeper.kept[KEPT]
    for network, found in ((nn.Sequential(classifier), state["classifier"]), (backbone, state["backbone"])):
        for name, value in network.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert (figures["top1"], figures["best_top1"]) == (top1[-1], max(top1))
    for name, value in task.backbone.state_dict().items():  # which others may go on to use
        assert torch.equal(value, tiny_backbone().state_dict()[name])
    assert not torch.equal(state["backbone"]["0.weight"], tiny_backbone()[0].weight)


@pytest.mark.parametrize("calls", [2, 4, 9])  # in the first epoch, in its test, in the last epoch
def test_stopped_at_any_place_it_goes_on_as_if_nothing_had_happened(sources: tuple, calls: int) -> None:
    whole, stopped = MemoryKeeper(), MemoryKeeper()
    figures = semisup(task_of(*sources, SETTINGS, subset_K=SUBSET, keeper=whole))
    with pytest.raises(StoppedError):
        semisup(task_of(*sources, SETTINGS, subset_K=SUBSET, keeper=stopped, progress=stop_after(calls)))
    assert semisup(task_of(*sources, SETTINGS, subset_K=SUBSET, keeper=stopped)) == figures
    assert stopped.saved == whole.saved  # nothing was done twice
    for name, value in whole.kept[KEPT]["backbone"].items():
        assert torch.equal(stopped.kept[KEPT]["backbone"][name], value)


def test_a_last_batch_of_one_image_is_left_out(sources: tuple) -> None:
    keeper = MemoryKeeper()
    semisup(task_of(*sources, SETTINGS, subset_K=SUBSET[:9], keeper=keeper))
    assert keeper.saved == 2 * EPOCHS


def test_too_few_images_for_batch_norm_are_one_sentence(
    sources: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DataError, match=r"^A batch of 1 images is too small [^\n]* takes 2 at least; [^\n]*\.$"
    ):
        semisup(task_of(*sources, {}, subset_K=np.array([3])))
    monkeypatch.setattr("eval.classifier.world_size", lambda: 9)
    with pytest.raises(DataError, match=r"on 9 processes, which takes 9 at least"):
        semisup(task_of(*sources, {"semisup": {"batch_size": 8}}))


def listed(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory: pytest.TempPathFactory, write_images: Callable) -> FolderSource:
    """Files named as in ImageNet, whose names do not repeat."""
    folder = tmp_path_factory.mktemp("named")
    write_images(folder, ["n01", "n02"], per_class=4)
    for path in folder.glob("*/*.jpg"):
        path.rename(path.with_name(f"{path.parent.name}_{path.stem}.JPEG"))
    return FolderSource(folder)


def test_list_of_file_names_is_read_as_simclr_publishes_it(
    imagenet_like: FolderSource, tmp_path: Path
) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"n02_3.JPEG\r\nn01_0.JPEG\r\nn02_1.JPEG\r\n")
    assert read_subset(path, imagenet_like).tolist() == [0, 5, 7]


def test_list_of_paths_and_of_numbers(sources: tuple, tmp_path: Path) -> None:
    train = sources[0]  # the names repeat in each class
    assert read_subset(listed(tmp_path, "c/1.jpg", "", "a/6.jpg"), train).tolist() == [6, 15]
    assert read_subset(listed(tmp_path, "20", "3"), train).tolist() == [3, 20]
    assert read_subset(listed(tmp_path, "20", "3"), UNNAMED).tolist() == [3, 20]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["a/1.jpg", "a/99.jpg"], r"image a/99.jpg of the list .* is not in .*train; check"),
        (["1.jpg"], r"image 1.jpg of the list .* is 3 times in .*train; write class/name instead"),
        (["a/1.jpg", "b/1.jpg", "a/1.jpg"], "names a/1.jpg 2 times; leave one"),
        (["1", "a/1.jpg"], "image 1 of the list .* is not in"),
        (["21"], "has sample 21, but .* holds 21;"),
        (["", " "], "names no images"),
    ],
)
def test_bad_list_is_one_sentence(sources: tuple, tmp_path: Path, lines: list[str], sentence: str) -> None:
    with pytest.raises(DataError, match=rf"^[^\n]*{sentence}[^\n]*\.$"):
        read_subset(listed(tmp_path, *lines), sources[0])


def test_list_of_names_for_a_dataset_without_and_a_missing_list(
    imagenet_like: FolderSource, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"^[^\n]* holds no file names; learn from the folder [^\n]*\.$"):
        read_subset(listed(tmp_path, "n01_0.JPEG"), UNNAMED)
    with pytest.raises(DataError, match=r"^Cannot read the list [^\n]*no.txt \(No such file[^\n]*\.$"):
        read_subset(tmp_path / "no.txt", imagenet_like)
    twice = listed(tmp_path, "n01_0.JPEG", "n01/n01_0.JPEG")
    with pytest.raises(DataError, match="names an image twice, by its name and by its path"):
        read_subset(twice, imagenet_like)


def test_draw_is_balanced_whatever_the_classes_and_fixed_by_the_seed() -> None:
    source = Labels([700, 732, 1300, 1300])
    drawn = draw_subset(source, 1, seed=0)  # 40 of 4,032 images
    assert (np.diff(drawn) > 0).all()
    assert Counter(source.labels_N[drawn].tolist()) == dict.fromkeys(range(4), 10)
    assert np.array_equal(draw_subset(source, 1, seed=0), drawn)
    assert not np.array_equal(draw_subset(source, 1, seed=1), drawn)
    counts = Counter(source.labels_N[draw_subset(source, 10.25, seed=3)].tolist())  # 413 images
    assert sorted(counts.values()) == [103, 103, 103, 104]
    assert len(draw_subset(Labels([50, 50]), 100, seed=0)) == 100


def test_every_image_is_drawn_equally_often() -> None:
    source = Labels([40, 40, 40])
    counts = np.bincount(
        np.concatenate([draw_subset(source, 25, seed) for seed in range(400)]), minlength=120
    )
    # 400 draws with probability 1/4: five standard deviations are 43.
    assert counts.sum() == 400 * 30 and abs(counts - 100).max() < 43


def test_a_percentage_that_is_too_small_or_too_large_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"^1 % of 120 images is 1, fewer than one for [^\n]*\.$"):
        draw_subset(Labels([40, 40, 40]), 1, seed=0)
    with pytest.raises(DataError, match=r"^90 % of the images is 49 of [^\n]*class0, which has 20[^\n]*\.$"):
        draw_subset(Labels([20, 89]), 90, seed=0)


@pytest.mark.parametrize("kind", ["repeating names", "names", "numbers"])
def test_drawn_list_gives_the_same_images_to_others(
    sources: tuple, imagenet_like: FolderSource, tmp_path: Path, kind: str
) -> None:
    source = {"repeating names": sources[0], "names": imagenet_like, "numbers": UNNAMED}[kind]
    drawn = draw_subset(source, 40, seed=2)
    (tmp_path / "list.txt").write_text(subset_list(source, drawn))
    assert np.array_equal(read_subset(tmp_path / "list.txt", source), drawn)
    first = (tmp_path / "list.txt").read_text().splitlines()[0]
    assert first.isdecimal() == (kind == "numbers") and ("/" in first) == (kind == "repeating names")
