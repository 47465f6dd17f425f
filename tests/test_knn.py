"""Weighted kNN against a plain loop over its definition."""

import errno
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import eval.feature_memory
import eval.knn
import eval.neighbours
import model.collectives
from eval.config import KnnConfig
from eval.feature_memory import allocate_features
from eval.knn import knn_accuracies, knn_accuracy
from eval.neighbours import nearest_neighbours
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


def sparse_signs(num: int, seed: int) -> Tensor:
    """(num, 24) with four entries of 1 or -1: cosines are quarters, so exact, and often equal."""
    random = torch.Generator().manual_seed(seed)
    places = torch.rand(num, 24, generator=random).topk(4).indices
    signs = torch.randint(2, (num, 4), generator=random) * 2.0 - 1
    return torch.zeros(num, 24).scatter(1, places, signs)


@pytest.fixture(params=[(1, 24), (7, 24 * 5), (2**26, 2**25)], ids=["one by one", "small", "large"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1 x 1, of 5 queries x 1 and of everything."""
    similarities, values = request.param
    monkeypatch.setattr(eval.neighbours, "MAX_SIMILARITIES", similarities)
    monkeypatch.setattr(eval.neighbours, "MAX_VALUES", values)


@pytest.mark.parametrize("k", [1, 13, 53])
def test_neighbours_are_their_definition_ties_included(blocks: None, k: int) -> None:
    bank, queries = sparse_signs(53, seed=1), sparse_signs(17, seed=2)
    similarities, indices = nearest_neighbours(bank, queries, k, "cpu")
    exact = (queries.double() @ bank.double().T / 4).tolist()
    expected = [sorted(range(53), key=lambda i, row=row: (-row[i], i))[:k] for row in exact]
    assert indices.tolist() == expected
    assert similarities.tolist() == [
        [row[i] for i in nearest] for row, nearest in zip(exact, expected, strict=True)
    ]
    assert k == 1 or any(len(set(row)) < k for row in similarities.tolist())  # there are ties


def test_features_that_are_all_the_same_are_neighbours_in_order(blocks: None) -> None:
    _, indices = nearest_neighbours(torch.ones(31, 16), torch.ones(3, 16), 5, "cpu")
    assert indices.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_on_a_gpu_finds_the_same_neighbours() -> None:
    bank, queries = sparse_signs(5003, seed=1), sparse_signs(101, seed=2)
    on_cpu, on_gpu = (nearest_neighbours(bank, queries, 50, device) for device in ("cpu", "cuda"))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(ours, theirs)
    bank, queries = torch.randn(5003, 2048), torch.randn(101, 2048)
    exact = torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(bank.double()).T
    similarities, indices = nearest_neighbours(bank, queries, 50, "cuda")
    torch.testing.assert_close(similarities.double(), exact.gather(1, indices), rtol=0, atol=2e-5)
    torch.testing.assert_close(similarities.double(), exact.topk(50).values, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (13, 0.07), (101, 0.5)])
def test_knn_is_its_definition(monkeypatch: pytest.MonkeyPatch, k: int, temperature: float) -> None:
    monkeypatch.setattr(eval.neighbours, "MAX_VALUES", 11 * 20)  # blocks of 20 samples, or queries
    monkeypatch.setattr(eval.knn, "MAX_VOTES", 15)  # three test samples at once
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


def test_several_k_at_once_are_each_alone() -> None:
    data = *features(101, 11, 5, seed=1), *features(37, 11, 5, seed=2)
    together = knn_accuracies(*data, [13, 1, 101], 0.5)
    assert together == {k: knn_accuracy(*data, KnnConfig(k=k, temperature=0.5)) for k in (13, 1, 101)}
    assert len(set(together.values())) > 1


@pytest.mark.parametrize("world_size", [2, 5, 40])
def test_ranks_share_the_test_samples_out(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    """Each rank's part of the sum, one rank after the other; with 40 ranks some have none of 37 samples."""
    data = *features(101, 11, 5, seed=1), *features(37, 11, 5, seed=2)
    whole = knn_accuracies(*data, [5, 20], 0.07)
    parts = []
    monkeypatch.setattr(model.collectives, "world_size", lambda: world_size)
    monkeypatch.setattr(eval.knn, "sum_over_ranks", lambda right: parts.append(right) or right)
    for rank in range(world_size):
        monkeypatch.setattr(model.collectives.dist, "get_rank", lambda rank=rank: rank)
        knn_accuracies(*data, [5, 20], 0.07, over_ranks=True)
    right = torch.stack(parts).sum(dim=0)
    assert {k: int(right[i]) / 37 for i, k in enumerate((5, 20))} == whole


def test_features_mapped_from_a_file_are_searched_like_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(eval.feature_memory, "MAPPED_FROM_BYTES", 4 * 101 * 11)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bank = allocate_features(101, 11)
    assert allocate_features(100, 11).shape == (100, 11)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert not list(tmp_path.iterdir())  # goes with the process, however it ends
    train, train_labels = features(101, 11, 5, seed=1)
    bank.copy_(train)
    test = features(37, 11, 5, seed=2)
    config = KnnConfig(k=13)
    assert knn_accuracy(bank, train_labels, *test, config) == knn_accuracy(train, train_labels, *test, config)


def test_a_full_disk_for_features_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(eval.feature_memory, "MAPPED_FROM_BYTES", 1)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(DataError, match=r"no room for 8\.0 GiB of features \(No space left.*TMPDIR\.$"):
        allocate_features(2**20, 2**11)


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
