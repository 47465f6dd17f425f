"""Linear evaluation: the authors' loop to the number, and its fast mode setting by setting."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import functional as tv

from eval.classifier import KEPT
from eval.config import LinearFastConfig
from eval.crops import RandomCrops
from eval.features import FeatureShare
from eval.linear import linear
from eval.linear_fast import BatchedTraining, LinearFastResult, Setting, choose_and_train, linear_fast
from model.errors import ModelError
from pipelines.errors import DataError
from pipelines.order import epoch_permutation
from pipelines.source import FolderSource, read_image
from tests.evaluations import STATISTICS, MemoryKeeper, StoppedError, stop_after, task_of, tiny_backbone

FAST = LinearFastConfig(epochs=20, batch_size=32, lr=(0.1, 1.0), weight_decay=(1e-6,))
EPOCHS, BATCH = 3, 8


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, write_images: Callable) -> tuple[FolderSource, ...]:
    folder = tmp_path_factory.mktemp("linear")
    write_images(folder / "train", ["a", "b", "c"], per_class=7, seed=1)  # two batches of 8 and one of 5
    write_images(folder / "test", ["a", "b", "c"], per_class=5, seed=2)
    return FolderSource(folder / "train"), FolderSource(folder / "test")


def pixels(source: FolderSource, index: int, box: np.ndarray | None, flip: bool = False) -> Tensor:
    """A normalised crop with torchvision's functions for PIL images, as in the authors' transforms."""
    image = read_image(source, index)
    if box is None:
        image = tv.center_crop(tv.resize(image, 18), [16, 16])
    else:
        image = tv.resized_crop(image, *map(int, box), [16, 16])
        image = tv.hflip(image) if flip else image
    return tv.normalize(tv.to_tensor(image), *map(list, STATISTICS))


def authors_loop(sources: tuple, seed: int, lr: float, weight_decay: float) -> tuple[nn.Linear, list[float]]:
    """The loop of the authors' evaluate.py with --weights freeze; the classifier and top-1 by epoch."""
    train, test = sources
    task = task_of(*sources, {})
    backbone, classifier = tiny_backbone(), nn.Linear(12, 3)
    generator = torch.Generator().manual_seed(seed)
    classifier.weight.data.normal_(0, 0.01, generator=generator)
    classifier.bias.data.zero_()
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    top1 = []
    for epoch in range(EPOCHS):
        boxes, flips = RandomCrops(train, task.config.features, seed, epoch).draw(np.arange(len(train)))
        order = epoch_permutation(len(train), seed, epoch)
        for batch in np.split(order, range(BATCH, len(order), BATCH)):
            images = torch.stack([pixels(train, i, boxes[i], flips[i]) for i in batch.tolist()])
            with torch.no_grad():
                features = backbone(images)
            loss = cross_entropy(classifier(features), torch.from_numpy(train.labels_N[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        with torch.no_grad():
            logits = classifier(backbone(torch.stack([pixels(test, i, None) for i in range(len(test))])))
        top1.append((logits.argmax(1).numpy() == test.labels_N).mean())
    return classifier, top1


def test_authors_mode_is_the_authors_loop(sources: tuple) -> None:
    expected, top1 = authors_loop(sources, seed=5, lr=2.0, weight_decay=0.01)
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 2.0, "weight_decay": 0.01, "seed": 5}
    keeper, calls = MemoryKeeper(), []
    task = task_of(*sources, {"linear": settings}, keeper=keeper, progress=lambda *call: calls.append(call))
    figures = linear(task)
    for name, value in keeper.kept[KEPT]["classifier"].items():
        torch.testing.assert_close(value, nn.Sequential(expected).state_dict()[name], rtol=1e-4, atol=1e-5)
    assert (figures["top1"], figures["best_top1"]) == (top1[-1], max(top1))
    assert figures["top5"] == figures["best_top5"] == 1  # three classes
    assert calls[-1] == (15 + 3 * 21, 15 + 3 * 21) and calls == sorted(calls)
    for name, value in task.backbone.state_dict().items():
        assert torch.equal(value, tiny_backbone().state_dict()[name])


@pytest.mark.parametrize("calls", [1, 3, 5, 9])  # in the test set's features; 1st, 2nd and last epoch
def test_stopped_at_any_place_it_goes_on_as_if_nothing_had_happened(sources: tuple, calls: int) -> None:
    settings = {"linear": {"epochs": EPOCHS, "batch_size": BATCH}}
    whole, stopped = MemoryKeeper(), MemoryKeeper()
    figures = linear(task_of(*sources, settings, keeper=whole))
    with pytest.raises(StoppedError):
        linear(task_of(*sources, settings, keeper=stopped, progress=stop_after(calls)))
    assert linear(task_of(*sources, settings, keeper=stopped)) == figures
    assert stopped.saved == whole.saved  # nothing was done twice
    for name, value in whole.kept[KEPT]["classifier"].items():
        assert torch.equal(stopped.kept[KEPT]["classifier"][name], value)


def shares_of(features: Tensor, labels: Tensor) -> FeatureShare:
    return FeatureShare(features, labels, 0, len(labels))


def clusters(num: int, num_classes: int, seed: int) -> FeatureShare:
    """Features in linearly separable clusters, one per class, and the labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_classes
    return shares_of(
        3 * torch.eye(num_classes, 16)[labels] + 0.3 * torch.randn(num, 16, generator=random), labels
    )


def test_all_settings_at_once_learn_what_each_learns_alone() -> None:
    """Against torch's own linear layer, SGD and schedule, over two passes in turn."""
    random = torch.Generator().manual_seed(2)
    labels = torch.randint(5, (37,), generator=random)
    passes = [shares_of(torch.randn(37, 9, generator=random), labels) for _ in range(2)]
    settings = [Setting(0.05, 0.0), Setting(0.5, 0.01), Setting(2.0, 1e-3)]
    config = LinearFastConfig(epochs=5, batch_size=8, seed=3)
    learnt_from = np.arange(3, 33)
    training = BatchedTraining(passes, 5, config, torch.device("cpu"))
    found_SCE = training.train(settings, learnt_from, lambda done, total: None)
    for setting, found_CE in zip(settings, found_SCE, strict=True):
        classifier = nn.Linear(9, 5)
        classifier.weight.data.normal_(0, 0.01, generator=torch.Generator().manual_seed(3))
        classifier.bias.data.zero_()
        optimizer = torch.optim.SGD(
            classifier.parameters(), setting.lr, momentum=0.9, weight_decay=setting.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for epoch in range(5):
            for rows in np.split(learnt_from[epoch_permutation(30, 3, epoch)], [8, 16, 24]):
                optimizer.zero_grad()
                cross_entropy(classifier(passes[epoch % 2].features_nF[rows]), labels[rows]).backward()
                optimizer.step()
            schedule.step()
        expected = torch.cat([classifier.weight, classifier.bias[:, None]], dim=1)
        torch.testing.assert_close(found_CE, expected, rtol=1e-4, atol=1e-5)


def test_separable_classes_are_learnt() -> None:
    result = choose_and_train([clusters(400, 10, 1)], clusters(150, 10, 2), 10, FAST)
    assert (result.top1, result.top5) == (1, 1)
    few = choose_and_train([clusters(60, 3, 1)], clusters(30, 3, 2), 3, FAST)
    assert (few.top1, few.top5) == (1, 1)  # all three are among the first five


def test_random_labels_stay_near_chance() -> None:
    random = torch.Generator().manual_seed(3)
    train, test = (
        shares_of(clusters(2000, 10, seed).features_nF, torch.randint(10, (2000,), generator=random))
        for seed in (1, 2)
    )
    result = choose_and_train([train], test, 10, FAST)
    # Five standard deviations of 2,000 independent guesses: 0.034 around 0.1, 0.056 around 0.5.
    assert abs(result.top1 - 0.1) < 0.034
    assert abs(result.top5 - 0.5) < 0.056


def test_choice_is_made_on_images_that_were_not_learnt_from() -> None:
    """Features that tell every image from every other can be learnt by heart; that must not count."""
    random = torch.Generator().manual_seed(4)
    labels = torch.randint(10, (200,), generator=random)
    train = shares_of(20 * torch.eye(200), labels)
    config = FAST.model_copy(update={"held_out": 0.5})
    result = choose_and_train([train], train, 10, config)
    assert result.top1 == 1
    assert all(top1 < 0.3 for top1 in result.held_out_top1.values())

    other = shares_of(train.features_nF, labels.roll(1))  # a test set has no say in it
    assert choose_and_train([train], other, 10, config).held_out_top1 == result.held_out_top1


def test_the_best_setting_is_taken_and_one_that_diverges_is_not() -> None:
    config = FAST.model_copy(update={"lr": (1e-30, 1e38, 0.5), "weight_decay": (1e-6, 1e30)})
    result = choose_and_train([clusters(300, 4, 1)], clusters(90, 4, 2), 4, config)
    assert result.chosen == (0.5, 1e-6) and result.top1 == 1
    assert result.held_out_top1[Setting(1e38, 1e30)] == 0 and len(result.held_out_top1) == 6
    with pytest.raises(ModelError, match=r"^The classifier diverges [^\n]* 1e\+38; [^\n]*\.$"):
        choose_and_train(
            [clusters(300, 4, 1)], clusters(9, 4, 2), 4, config.model_copy(update={"lr": (1e38,)})
        )


def test_seed_fixes_the_result_and_no_other_random_state_does() -> None:
    train, test = (
        shares_of(torch.randn(num, 16, generator=torch.Generator().manual_seed(num)), torch.arange(num) % 7)
        for num in (100, 1009)
    )

    def probe(seed: int) -> LinearFastResult:
        config = FAST.model_copy(update={"epochs": 3, "seed": seed})
        return choose_and_train([train], test, 7, config)

    before = torch.get_rng_state()
    first = probe(seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert probe(seed=0) == first
    assert {probe(seed).top1 for seed in (1, 2, 3)} != {first.top1}


def test_single_setting_needs_no_held_out_images_and_several_do() -> None:
    two = clusters(2, 2, 1)
    alone = FAST.model_copy(update={"lr": (0.1,)})
    assert choose_and_train([two], two, 2, alone).held_out_top1 == {}
    with pytest.raises(DataError, match=r"^Of 2 training images a held-out share of 0.1 leaves [^\n]*\.$"):
        choose_and_train([two], two, 2, FAST)


def test_fast_mode_extracts_what_its_passes_ask_for(sources: tuple) -> None:
    settings = {"epochs": 30, "batch_size": 8, "lr": (0.3,), "weight_decay": (0.0,)}
    found = {}
    for passes in (0, 3):
        keeper = MemoryKeeper()
        task = task_of(*sources, {"linear_fast": settings | {"passes": passes}}, keeper=keeper)
        found[passes] = linear_fast(task), keeper.kept
    names = [f"train-{number}-0-21" for number in range(3)]
    crops = [found[3][1][name] for name in names]
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(crops[1], crops[2])
    centre = torch.stack([pixels(sources[0], index, None) for index in range(21)])
    expected = tiny_backbone()(centre).detach()
    torch.testing.assert_close(found[0][1][names[0]], expected, rtol=1e-5, atol=1e-6)
    assert found[0][1].keys() == {names[0], "test-0-15"}
    assert found[3][0].top1 > 0.6  # three classes of brightness


def test_classifier_that_diverges_is_one_sentence(sources: tuple) -> None:
    with pytest.raises(ModelError, match=r"^The classifier's outputs are not all finite [^\n]*\.$"):
        linear(task_of(*sources, {"linear": {"epochs": 3, "batch_size": 4, "lr": 1e38}}))


def test_with_as_many_passes_as_epochs_the_fast_mode_is_the_authors(sources: tuple) -> None:
    shared = {"epochs": EPOCHS, "batch_size": BATCH, "seed": 5}
    settings = {
        "linear": shared | {"lr": 0.5, "weight_decay": 0.01},
        "linear_fast": shared | {"passes": EPOCHS, "lr": (0.5,), "weight_decay": (0.01,)},
    }
    keeper, test = MemoryKeeper(), sources[1]
    slow = linear(task_of(*sources, settings, keeper=keeper))
    fast = linear_fast(task_of(*sources, settings, keeper=keeper))
    assert (fast.top1, fast.top5) == (slow["top1"], slow["top5"])
    passes = [
        shares_of(keeper.kept[f"train-{number}-0-21"], torch.from_numpy(sources[0].labels_N))
        for number in range(EPOCHS)
    ]
    config = task_of(*sources, settings).config.linear_fast
    training = BatchedTraining(passes, len(test.classes), config, torch.device("cpu"))
    (found_CE,) = training.train([Setting(0.5, 0.01)], np.arange(21), lambda done, total: None)
    state = keeper.kept[KEPT]["classifier"]
    expected = torch.cat([state["0.weight"], state["0.bias"][:, None]], dim=1)
    torch.testing.assert_close(found_CE, expected, rtol=1e-4, atol=1e-5)
