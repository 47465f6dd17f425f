"""The figures of an audit against independent ways to compute them."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import entropy, hypergeom
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import eval.audit.neighbours
from eval.audit.attributes import Attribute
from eval.audit.config import SilentConfig
from eval.audit.dimensions import measure_dimensions
from eval.audit.drift import linear_cka, measure_drift, neighbour_overlap, overlap_chance, verdict
from eval.audit.groups import accuracy_by_group, wilson
from eval.audit.leaks import Leak, read_out
from eval.audit.neighbours import classify, nearest, one_of_each_class, worst


def features(num: int, width: int, seed: int) -> Tensor:
    """Correlated, of varied lengths, not centred."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(num, width, generator=random) @ torch.randn(width, width, generator=random)
    return (mixed + torch.randn(width, generator=random)) * torch.rand(num, 1, generator=random).add(0.1)


@pytest.mark.parametrize(("num", "width", "k", "limit"), [(57, 13, 7, 2**26), (101, 5, 100, 250)])
def test_neighbours_are_those_of_scikit_learn(
    num: int, width: int, k: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval.audit.neighbours, "MAX_SIMILARITIES", limit)
    x = features(num, width, seed=1)
    similarities, indices = nearest(x, k)
    reference = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(x.double())
    distances, expected = reference.kneighbors()  # leaves each point itself out
    torch.testing.assert_close(similarities.double(), torch.from_numpy(1 - distances), rtol=0, atol=1e-5)
    assert (indices == torch.from_numpy(expected)).double().mean() > 0.99  # but for ties in float32
    assert not (indices == torch.arange(num)[:, None]).any()


def test_prediction_is_the_largest_sum_of_weights_of_the_others() -> None:
    x, labels = features(41, 9, seed=2), torch.randint(3, (41,), generator=torch.Generator().manual_seed(3))
    predicted = classify(*nearest(x, 11), labels, 3, temperature=0.1)
    cosines = 1 - cdist(x.double(), x.double(), "cosine")
    for i in range(41):
        votes = [0.0, 0.0, 0.0]
        for j in sorted((j for j in range(41) if j != i), key=lambda j: -cosines[i, j])[:11]:
            votes[labels[j]] += math.exp(cosines[i, j] / 0.1)
        assert predicted[i] == np.argmax(votes)


def test_sheets_show_each_class_once_and_the_worst_first() -> None:
    labels = torch.tensor([2, 0, 1, 1, 2, 2, 0])
    assert labels[one_of_each_class(labels, rows=9, seed=5)].tolist() == [0, 1, 2]
    assert len(one_of_each_class(labels, rows=2, seed=5)) == 2
    neighbours = torch.tensor([[4, 5], [2, 3], [3, 1], [2, 4], [5, 1], [0, 4], [0, 2]])
    similarities = torch.full((7, 2), 0.5)
    similarities[6] = 0.9  # as bad as image 1, but nearer
    assert worst(neighbours, similarities, labels, rows=3).tolist()[:2] == [6, 1]
    assert set(worst(neighbours, similarities, labels, rows=9).tolist()) == {6, 1, 2, 3, 4}


def test_intervals_are_wilsons() -> None:
    for right, images in ((0, 7), (3, 11), (50, 50), (977, 1200)):
        z, p = 1.959963984540054, right / images
        middle = (p + z * z / (2 * images)) / (1 + z * z / images)
        half = z / (1 + z * z / images) * math.sqrt(p * (1 - p) / images + z * z / (4 * images**2))
        assert wilson(right, images) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_a_group_stands_out_only_if_large_and_beyond_the_corrected_interval() -> None:
    right = np.zeros(1000, dtype=bool)
    right[:500] = True
    groups = {
        "all right": np.arange(100),
        "small": np.arange(5),
        "as all": np.arange(450, 550),
        "barely": np.arange(438, 538),  # 62 of 100: outside the 95 % interval, not outside the corrected one
        "none": np.arange(0),
    }
    found = {group.name: group for group in accuracy_by_group(right, groups, min_group=30)}
    assert "none" not in found
    assert [found[name].stands_out for name in ("all right", "small", "as all", "barely")] == [
        True,
        *[False] * 3,
    ]
    assert [found[name].too_small for name in ("all right", "small")] == [False, True]
    assert found["barely"].accuracy == 0.62 and found["barely"].low > 0.5


@pytest.mark.parametrize(("num", "width"), [(57, 13), (20, 31)])
def test_dimensions_are_those_of_numpy_and_scipy(num: int, width: int) -> None:
    x = features(num, width, seed=4)
    x[:, 3] = 7.0  # dead
    x[:, 5] = 2 * x[:, 4] + 1e-3 * x[:, 6]  # redundant
    found = measure_dimensions(x, dead_share=0.01, correlated=0.9)
    y = x.double().numpy()
    eigenvalues = np.linalg.eigvalsh(np.cov(y, rowvar=False))[::-1]
    np.testing.assert_allclose(found.eigenvalues, eigenvalues.clip(0), atol=1e-9 * eigenvalues[0])
    shares = np.linalg.svd(y - y.mean(0), compute_uv=False) ** 2
    assert found.effective_rank == pytest.approx(math.exp(entropy(shares)), rel=1e-6)
    assert found.participation_ratio == pytest.approx(shares.sum() ** 2 / (shares**2).sum(), rel=1e-9)
    singular = np.linalg.svd(y, compute_uv=False)
    assert found.rankme == pytest.approx(math.exp(entropy(singular)), rel=1e-4)  # which adds 1e-7 to each
    assert found.dead == [3]
    live = np.delete(y, 3, axis=1)
    correlations = np.abs(np.corrcoef(live, rowvar=False)[np.triu_indices(width - 1, 1)])
    assert found.pairs == len(correlations)
    assert found.mean_correlation == pytest.approx(correlations.mean(), rel=1e-9)
    assert found.redundant_pairs == (correlations > 0.9).sum() >= 1
    assert found.most_correlated == pytest.approx((4, 5, correlations.max()))
    assert found.norms["mean"] == pytest.approx(np.linalg.norm(y, axis=1).mean())


def kernel_cka(x: Tensor, y: Tensor, *, debiased: bool) -> float:
    """From N x N kernels as the papers write it: Kornblith et al. 2019, Song et al. 2012, equation 5."""
    n = len(x)

    def hsic(a: Tensor, b: Tensor) -> float:
        k, l = (z.double().numpy() @ z.double().numpy().T for z in (a, b))  # noqa: E741
        if not debiased:
            h = np.eye(n) - 1 / n
            return np.trace(k @ h @ l @ h) / (n - 1) ** 2
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)
        one = np.ones(n)
        terms = np.trace(k @ l), (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)), one @ k @ l @ one
        return (terms[0] + terms[1] - 2 / (n - 2) * terms[2]) / (n * (n - 3))

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(("num", "widths"), [(57, (13, 7)), (9, (31, 17))])
def test_cka_is_that_of_the_kernels(num: int, widths: tuple[int, int], debiased: bool) -> None:
    x = features(num, widths[0], seed=6)
    y = features(num, widths[1], seed=7) + x[:, : widths[1]].mean(dim=1, keepdim=True)
    expected = kernel_cka(x, y, debiased=debiased)
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    rotation = torch.linalg.qr(torch.randn(widths[0], widths[0])).Q
    assert linear_cka(x, 1e-3 * x @ rotation + 5, debiased=debiased) == pytest.approx(1, abs=1e-4)
    assert linear_cka(x, torch.ones(num, 3), debiased=debiased) == 0.0


def test_debiased_cka_of_independent_wide_features_is_near_nothing() -> None:
    x, y = (torch.randn(60, 500, generator=torch.Generator().manual_seed(seed)) for seed in (8, 9))
    assert linear_cka(x, y, debiased=False) > 0.8  # why it is not trusted
    assert abs(linear_cka(x, y, debiased=True)) < 0.1


def test_overlap_counts_shared_neighbours_and_knows_the_chance() -> None:
    random = np.random.default_rng(10)
    first, second = (
        torch.tensor(np.array([random.permutation(30)[:4] for _ in range(3000)])) for _ in range(2)
    )
    share, jaccard = neighbour_overlap(first, second)
    sets = [(set(a), set(b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert share == pytest.approx(np.mean([len(a & b) / 4 for a, b in sets]))
    assert jaccard == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in sets]))
    assert overlap_chance(31, 4) == pytest.approx((share, jaccard), abs=0.01)
    assert overlap_chance(31, 4)[0] == pytest.approx(hypergeom(30, 4, 4).mean() / 4)


def test_drift_counts_what_changed_and_the_verdict_names_it() -> None:
    x = features(40, 6, seed=11)
    labels = torch.arange(40) % 2
    before = labels.clone()
    after = torch.where(torch.arange(40) < 9, 1 - labels, labels)  # 9 become wrong, 5 of them of class a
    neighbours = nearest(x, 5)[1]
    drift = measure_drift((x, x), (neighbours, neighbours), (before, after), labels, ["a", "b"])
    assert drift.cosine == pytest.approx(1) and drift.cka == pytest.approx(1) and drift.overlap == 1
    assert (drift.became_right, drift.became_wrong) == (0, 9)
    assert drift.p_value == pytest.approx(2 * 0.5**9)
    assert drift.agreement == pytest.approx(31 / 40)
    assert [(c.before, c.after, c.changed, c.most_often_to) for c in drift.classes] == [
        (1, 15 / 20, 5 / 20, "b"),
        (1, 16 / 20, 4 / 20, "a"),
    ]
    silent, sentence = verdict(drift, SilentConfig(), min_group=20)
    assert not silent and "agree 0.775" in sentence and "class a from 100.0% to 75.0%" in sentence
    silent, sentence = verdict(drift, SilentConfig(agreement=0.5), min_group=21)
    assert silent and sentence.startswith("The replacement may be silent")


def test_a_rotated_copy_is_never_silent() -> None:
    """Nearest neighbours and CKA are the same, but stored features are of no use any more."""
    x = features(40, 6, seed=12)
    turned = x @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    neighbours = nearest(x, 5)[1], nearest(turned, 5)[1]
    drift = measure_drift((x, turned), neighbours, None, torch.zeros(40, dtype=torch.int64), [])
    assert drift.overlap > 0.99 and drift.cka == pytest.approx(1, abs=1e-6) and drift.agreement is None
    silent, sentence = verdict(drift, SilentConfig(), min_group=1)
    assert not silent and "cosine" in sentence
    drift = measure_drift((x, torch.cat([x, x], 1)), neighbours, None, torch.zeros(40).long(), [])
    assert "another width" in verdict(drift, SilentConfig(), min_group=1)[1]


def test_a_planted_attribute_is_read_and_noise_is_not() -> None:
    random = np.random.default_rng(13)
    values = random.integers(0, 3, 200)
    values[:3], x = 3, random.normal(size=(200, 8))  # category "rare" has three images
    x[:, 2] += 2 * (values == 1)
    x[:, 5] += 2 * (values == 2)
    attribute = Attribute("planted", ["a", "b", "c", "rare"], values.astype(np.int64))
    leak = read_out(x, attribute, folds=5, shuffles=2, seed=0)
    assert isinstance(leak, Leak) and leak.leaks and leak.converged
    assert (leak.images, leak.categories, leak.chance) == (197, ["a", "b", "c"], 1 / 3)
    assert leak.low < leak.balanced_accuracy < leak.high and leak.balanced_accuracy > 0.6
    assert abs(leak.shuffled - 1 / 3) < 0.1

    noise = Attribute("noise", ["a", "b"], random.integers(0, 2, 200))
    assert not read_out(x, noise, folds=5, shuffles=2, seed=0).leaks
    constant = Attribute("constant", ["a"], np.zeros(200, np.int64))
    assert read_out(x, constant, folds=5, shuffles=2, seed=0) == "the same for all images (a)"
    rare = Attribute("rare", ["a", "b"], (np.arange(200) < 3).astype(np.int64))
    assert read_out(x, rare, folds=5, shuffles=2, seed=0).startswith("fewer than two")


def test_balanced_accuracy_and_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scikit-learn, and against a bootstrap that draws the images themselves."""
    random = np.random.default_rng(14)
    values = random.choice(3, 300, p=[0.6, 0.3, 0.1])
    predicted = np.where(random.random(300) < 0.7, values, random.integers(0, 3, 300))
    monkeypatch.setattr("eval.audit.leaks._predict", lambda *_: (predicted, True))
    leak = read_out(np.zeros((300, 1)), Attribute("x", ["a", "b", "c"], values), folds=5, shuffles=1, seed=0)
    assert leak.balanced_accuracy == pytest.approx(balanced_accuracy_score(values, predicted))
    drawn = []
    for _ in range(300):
        rows = np.concatenate(
            [random.choice(np.flatnonzero(values == c), (values == c).sum()) for c in range(3)]
        )
        drawn.append(balanced_accuracy_score(values[rows], predicted[rows]))
    assert (leak.low, leak.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.015)
