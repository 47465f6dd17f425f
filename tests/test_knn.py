"""Weighted kNN against a plain loop over its definition."""

import math

import pytest
import torch
from torch import Tensor

import eval.knn
from eval.config import KnnConfig
from eval.knn import knn_accuracy
from pipelines.errors import DataError


def features(num: int, width: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy features around one direction per class, of varied lengths, and the labels."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (num,), generator=random)
    noisy = centres[labels] + 2 * torch.randn(num, width, generator=random)
    return noisy * torch.empty(num, 1).uniform_(0.1, 10, generator=random), labels


def definition(train: Tensor, train_labels: Tensor, test: Tensor, k: int, temperature: float) -> list[int]:
    """Predicted class of each test sample, in Python's floats (64 bits)."""
    predictions = []
    for x in test.double().tolist():
        similarities = []
        for y in train.double().tolist():
            dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
            similarities.append(dot / math.hypot(*x) / math.hypot(*y))
        nearest = sorted(range(len(train)), key=lambda i: -similarities[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            label = int(train_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(similarities[i] / temperature)
        predictions.append(max(votes, key=lambda label: votes[label]))
    return predictions


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (13, 0.07), (101, 0.5)])
def test_knn_is_its_definition(
    monkeypatch: pytest.MonkeyPatch, k: int, temperature: float, block: int
) -> None:
    monkeypatch.setattr(eval.knn, "MAX_SIMILARITIES", block * 101)  # test rows in one block
    train, train_labels = features(101, 11, 5, seed=1)
    test, _ = features(37, 11, 5, seed=2)
    expected = torch.tensor(definition(train, train_labels, test, k, temperature))
    config = KnnConfig(k=k, temperature=temperature)
    # Scoring each sample alone against its expected class checks every prediction, not only their share.
    for i in range(len(test)):
        assert knn_accuracy(train, train_labels, test[i : i + 1], expected[i : i + 1], config) == 1
    assert knn_accuracy(train, train_labels, test, expected, config) == 1
    wrong = expected.clone()
    wrong[:10] += 1
    assert knn_accuracy(train, train_labels, test, wrong, config) == 27 / 37


def test_temperature_decides_between_few_near_and_many_far_neighbours() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    test, label = torch.tensor([[5.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(train, labels, test, label, KnnConfig(k=3, temperature=0.1)) == 1
    assert knn_accuracy(train, labels, test, label, KnnConfig(k=3, temperature=10)) == 0


def test_small_temperatures_do_not_overflow() -> None:
    train, train_labels = features(101, 11, 5, seed=1)
    test, _ = features(37, 11, 5, seed=2)
    nearest = torch.tensor(definition(train, train_labels, test, k=1, temperature=1))
    assert knn_accuracy(train, train_labels, test, nearest, KnnConfig(k=50, temperature=1e-6)) == 1


def test_test_class_without_training_images_is_never_right() -> None:
    train, train_labels = features(20, 4, 2, seed=1)
    assert knn_accuracy(train, train_labels, train[:2], torch.tensor([7, 7]), KnnConfig(k=3)) == 0


def test_more_neighbours_than_training_images_is_one_sentence() -> None:
    train, labels = features(20, 4, 2, seed=1)
    with pytest.raises(DataError, match=r"eval\.knn\.k is 21, but there are only 20 training images"):
        knn_accuracy(train, labels, train, labels, KnnConfig(k=21))
