"""The loss: every algorithm equals the definition, in values and gradients, on one process and on ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from model import collectives, triton_support
from model.config import LossConfig
from model.errors import ModelError
from model.loss import ALGORITHMS, barlow_loss, torch_ops
from model.loss.objective import Objective
from model.loss.reference import cross_correlation, reference_loss

SHAPES = [(3, 5), (3, 127), (17, 5), (17, 127), (252, 127), (252, 507)]
OBJECTIVES = {
    "paper": {},
    "equal weights": {"off_diagonal_weight": 1.0},
    "invariance only": {"off_diagonal_weight": 0},
    "redundancy only": {"invariance_weight": 0},
    "features": {"normalise": "features"},
    "none": {"normalise": "none"},
    "cross-entropy": {"temperature": 0.3, "off_diagonal_weight": 0.7},
    "cross-entropy, features": {"temperature": 0.01, "normalise": "features"},
}


def configs(objective: str) -> list[LossConfig]:
    """The objective by every algorithm that serves it."""
    settings = OBJECTIVES[objective]
    names = ["dense"] if "temperature" in settings else ALGORITHMS
    return [LossConfig(algorithm=name, **settings) for name in names]


def embeddings(n: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """Correlated views with uneven means and scales, as real embeddings have."""
    generator = torch.Generator().manual_seed(1000 * n + width + seed)
    shared = torch.randn(n, width, generator=generator, dtype=dtype)
    scale = torch.rand(width, generator=generator, dtype=dtype) * 3
    return [
        (shared + 0.5 * torch.randn(n, width, generator=generator, dtype=dtype)) * scale + 2 * scale
        for _ in range(2)
    ]


def value_and_gradients(loss, z_a, z_b, config):
    z_a, z_b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    terms = loss(z_a, z_b, config)
    terms[0].backward()
    return [t.detach() for t in terms], z_a.grad, z_b.grad


def distance(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((x.to(truth.dtype) - truth).norm() / truth.norm()).item()


def assert_equals_definition(z_a, z_b, config, truth, tolerance: float) -> None:
    """Terms and gradients within the relative `tolerance` of the float64 `truth`."""
    terms, *gradients = value_and_gradients(barlow_loss, z_a, z_b, config)
    expected, *expected_gradients = truth
    torch.testing.assert_close(terms, [t.to(terms[0]) for t in expected], rtol=tolerance, atol=tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == z_a.dtype
        assert distance(gradient, expected_gradient) <= tolerance


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n", "width"), [(2, 3), *SHAPES])
def test_every_algorithm_equals_the_definition_in_float64(objective: str, n: int, width: int) -> None:
    z_a, z_b = embeddings(n, width)
    for config in configs(objective):
        truth = value_and_gradients(reference_loss, z_a, z_b, config)
        assert_equals_definition(z_a, z_b, config, truth, 1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_every_algorithm_equals_the_definition_in_float32(objective: str, n: int, width: int) -> None:
    """Not with 2 samples: their gradient is what eps leaves of two numbers that cancel.

    No element of C may lie within rounding of 0, where max(C_ij, 0) of the cross-entropy has its kink.
    """
    tries = (embeddings(n, width, torch.float32, seed) for seed in range(1, 20))
    z_a, z_b = next(z for z in tries if cross_correlation(*(v.double() for v in z)).abs().min() > 1e-7)
    for config in configs(objective):
        truth = value_and_gradients(reference_loss, z_a.double(), z_b.double(), config)
        assert_equals_definition(z_a, z_b, config, truth, 1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", ["constant columns", "duplicated view", "one feature", "large means"])
def test_unusual_embeddings_get_the_definitions_loss(algorithm: str, case: str) -> None:
    z_a, z_b = embeddings(17, 33, seed=1)
    if case == "constant columns":
        z_a[:, ::3] = 2.5
        z_b[:, 1] = -7
    elif case == "duplicated view":
        z_b = z_a.clone()
    elif case == "one feature":
        z_a, z_b = z_a[:, :1], z_b[:, :1]
    else:
        z_a, z_b = z_a + 1000, z_b - 1000
    config = LossConfig(algorithm=algorithm)
    truth = value_and_gradients(reference_loss, z_a, z_b, config)
    assert_equals_definition(z_a, z_b, config, truth, 1e-10)
    z_a, z_b = z_a.float(), z_b.float()
    truth = value_and_gradients(reference_loss, z_a.double(), z_b.double(), config)
    assert_equals_definition(z_a, z_b, config, truth, 1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "width"), [(17, 127), (252, 507), (252, 127)])
def test_half_precision_is_no_further_from_the_truth_than_plain_torch(algorithm, dtype, n, width) -> None:
    """Gram and sharded: unless the redundancy is far smaller than sum_i C_ii^2 (see `model/loss/gram.py`)."""

    def plain(z_a, z_b, config):
        a, b = (nn.functional.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
        c = (a.T @ b / n).float()
        invariance = (1 - c.diagonal()).square().sum()
        redundancy = c.square().sum() - c.diagonal().square().sum()
        return invariance + config.off_diagonal_weight * redundancy, invariance, redundancy

    config = LossConfig(algorithm=algorithm)
    z_a, z_b = (z.to(dtype) for z in embeddings(n, width))
    truth, truth_a, truth_b = value_and_gradients(reference_loss, z_a.double(), z_b.double(), config)
    theirs, theirs_a, theirs_b = value_and_gradients(plain, z_a, z_b, config)
    ours, ours_a, ours_b = value_and_gradients(barlow_loss, z_a, z_b, config)
    assert ours[0].dtype == torch.float32
    assert ours_a.dtype == ours_b.dtype == dtype
    small = torch.finfo(dtype).eps / 8
    assert distance(ours[0], truth[0]) <= distance(theirs[0], truth[0]) + small
    assert distance(ours_a, truth_a) <= distance(theirs_a, truth_a) + small
    assert distance(ours_b, truth_b) <= distance(theirs_b, truth_b) + small


@pytest.mark.parametrize("algorithm", ["gram", "sharded"])
def test_wide_collapsed_embeddings_do_not_overflow_in_float16(algorithm: str) -> None:
    """All 16,384 features equal: the Gram matrices are as large as they can be."""
    column = torch.randn(24, 1, generator=torch.Generator().manual_seed(5))
    column[0] = 60  # one sample far out
    z_a = column.expand(-1, 16384).half().contiguous()
    z_b = (z_a + 0.01).half()
    config = LossConfig(algorithm=algorithm)
    terms, grad_a, _ = value_and_gradients(barlow_loss, z_a, z_b, config)
    # Every element of C is that of a single feature.
    c = cross_correlation(z_a[:, :1].double(), z_b[:, :1].double()).item()
    expected = [16384 * (1 - c) ** 2, 16384 * 16383 * c**2]
    torch.testing.assert_close([t.double().item() for t in terms[1:]], expected, rtol=2e-3, atol=1e-3)
    assert grad_a.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_agrees_with_finite_differences(objective: str) -> None:
    for config in configs(objective):
        z_a, z_b = (z.requires_grad_() for z in embeddings(6, 4))
        assert torch.autograd.gradcheck(lambda a, b, c=config: barlow_loss(a, b, c).total, (z_a, z_b))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_second_derivative_is_refused_with_a_sentence(algorithm: str) -> None:
    z_a, z_b = (z.requires_grad_() for z in embeddings(6, 4))
    total = barlow_loss(z_a, z_b, LossConfig(algorithm=algorithm)).total
    with pytest.raises(ModelError, match=r"^The loss cannot be differentiated twice; .*\.$"):
        torch.autograd.grad(total, z_a, create_graph=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_gradients_scale_comes_from_what_follows_the_loss(algorithm: str) -> None:
    z_a, z_b = embeddings(9, 7)
    config = LossConfig(algorithm=algorithm)
    _, expected, _ = value_and_gradients(reference_loss, z_a, z_b, config)
    z_a.requires_grad_()
    (barlow_loss(z_a, z_b, config).total * 1024).backward()
    torch.testing.assert_close(z_a.grad, 1024 * expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_is_float32_inside_autocast_and_takes_any_layout(algorithm: str) -> None:
    config = LossConfig(algorithm=algorithm)
    z_a, z_b = (z.float() for z in embeddings(16, 24))
    with torch.autocast("cpu", torch.bfloat16):
        loss = barlow_loss(z_a.T.contiguous().T, z_b, config)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(list(loss), list(reference_loss(z_a, z_b, config)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_waits_for_an_accelerator(algorithm: str) -> None:
    """On pretended CUDA tensors, looking at a value raises. (The autograd engine wants real ones.)"""
    saved = SimpleNamespace(mark_non_differentiable=lambda *tensors: None)
    saved.save_for_backward = lambda *tensors: setattr(saved, "saved_tensors", tensors)
    loss = ALGORITHMS[algorithm]
    with FakeTensorMode(), torch.no_grad():
        z_a, z_b = (torch.empty(6, 5, device="cuda", dtype=torch.bfloat16) for _ in "ab")
        terms = loss.forward(saved, z_a, z_b, Objective.of(LossConfig()), torch_ops)
        gradients = loss.backward(saved, terms[0])
    assert all(term.device.type == "cuda" and term.shape == () for term in terms)
    assert all(gradient.shape == (6, 5) for gradient in gradients[:2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_backward_may_run_twice_under_autocast_and_for_one_view_alone(algorithm: str) -> None:
    config = LossConfig(algorithm=algorithm)
    z_a, z_b = embeddings(9, 7, torch.float32)
    truth = value_and_gradients(reference_loss, z_a.double(), z_b.double(), config)[1]
    z_a.requires_grad_()
    total = barlow_loss(z_a, z_b, config).total
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            (gradient,) = torch.autograd.grad(total, z_a, retain_graph=True)
        assert distance(gradient, truth) <= 1e-5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_number_that_is_none_reaches_the_total(algorithm: str) -> None:
    z_a, z_b = embeddings(9, 7)
    z_a[3, 2] = torch.nan
    assert barlow_loss(z_a, z_b, LossConfig(algorithm=algorithm)).total.isnan()


def test_counts_of_rows_are_looked_at_only_where_they_change(monkeypatch) -> None:
    """On a pretended accelerator: looking at a tensor on "meta" raises."""
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(collectives.dist, "all_reduce", lambda tensor: None)
    rows, accelerator = collectives.EqualRows(), torch.device("meta")
    with pytest.raises(NotImplementedError):
        rows.check(4, accelerator)
    rows._last = 2, 4
    rows.check(4, accelerator)
    with pytest.raises(NotImplementedError):
        rows.check(5, accelerator)


def test_identical_whitened_views_have_the_smallest_loss() -> None:
    columns, _ = torch.linalg.qr(torch.cat([torch.ones(64, 1), torch.randn(64, 8)], 1).double())
    z = columns[:, 1:] * 1e4  # orthogonal to the ones, so centred; scaled so that eps does not matter
    for algorithm in ALGORITHMS:
        loss = barlow_loss(z, z, LossConfig(algorithm=algorithm))
        torch.testing.assert_close(list(loss), [torch.zeros((), dtype=torch.float64)] * 3, rtol=0, atol=1e-9)


def test_authors_formula_gives_the_same_value() -> None:
    z_a, z_b = embeddings(32, 24)
    norm = nn.BatchNorm1d(24, affine=False, dtype=torch.float64)
    c = norm(z_a).T @ norm(z_b) / 32
    torch.testing.assert_close(cross_correlation(z_a, z_b), c)
    off_diagonal = c.flatten()[:-1].view(23, 25)[:, 1:].flatten()
    total = (c.diagonal() - 1).square().sum() + 0.0051 * off_diagonal.square().sum()
    torch.testing.assert_close(barlow_loss(z_a, z_b, LossConfig()).total, total)


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((1, 3), (1, 3)), ((2, 3, 4), (2, 3, 4)), ((0, 3), (0, 3))],
)
def test_unfit_embeddings_are_refused_with_a_sentence(shape_a: tuple, shape_b: tuple) -> None:
    with pytest.raises(ModelError, match=r"^The loss .*\.$"):
        barlow_loss(torch.randn(shape_a), torch.randn(shape_b), LossConfig())


def test_embeddings_of_different_or_integer_dtypes_are_refused_with_a_sentence() -> None:
    z = torch.randn(4, 3)
    with pytest.raises(ModelError, match=r"^The loss .*float32 on cpu and torch.float64 on cpu\.$"):
        barlow_loss(z, z.double(), LossConfig())
    for dtype in (torch.int64, torch.float8_e4m3fn):
        with pytest.raises(ModelError, match=r"^The loss .*\.$"):
            barlow_loss(z.to(dtype), z.to(dtype), LossConfig())


def test_triton_where_it_cannot_run_gives_way_to_torch_and_says_so_once(monkeypatch, caplog) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_support._warn_once.cache_clear()
    z_a, z_b = embeddings(4, 3, torch.float32)
    config = LossConfig(implementation="triton")
    terms = [barlow_loss(z_a, z_b, config) for _ in range(2)]
    said = [message for message in caplog.messages if "Triton" in message]
    assert said == ["The loss runs without its Triton kernels: Triton does not compile for the device cpu."]
    assert terms[0] == terms[1] == barlow_loss(z_a, z_b, LossConfig(implementation="torch"))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_with_different_data_get_the_global_loss_and_its_exact_gradient(
    world_size: int, run_ranks, tmp_path
) -> None:
    """For embeddings, and for the parameters below them under DDP and synchronised batch-norm."""
    n, width = 5 * world_size, 11
    generator = torch.Generator().manual_seed(world_size)
    network = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, width)).double()
    objectives = OBJECTIVES if world_size == 2 else ["paper"]
    exact = [config for objective in objectives for config in configs(objective)]
    exact.append(LossConfig(algorithm="auto"))  # the ranks' own plans would differ
    cases = [(config, torch.float64) for config in exact]
    cases += [(LossConfig(algorithm=name), torch.bfloat16) for name in ALGORITHMS]
    given = {
        "embeddings": [z.bfloat16().double() for z in embeddings(n, width)],
        "inputs": [torch.randn(n, 6, generator=generator, dtype=torch.float64) for _ in range(2)],
        "network": network,
        "cases": cases,
        "configs": exact,
    }
    torch.save(given, tmp_path / "given.pt")
    run_ranks(world_size, "loss.py", tmp_path)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(world_size)]
    for i, (config, dtype) in enumerate(cases):
        tolerance = 1e-10 if dtype == torch.float64 else 2e-2
        expected, *gradients = value_and_gradients(reference_loss, *given["embeddings"], config)
        for rank in ranks:
            terms = [t.double() for t in rank["embeddings"][i][0]]
            torch.testing.assert_close(terms, expected, rtol=tolerance, atol=tolerance)
        for view, gradient in enumerate(gradients, start=1):
            ours = torch.cat([rank["embeddings"][i][view] for rank in ranks])
            assert ours.dtype == dtype
            assert distance(ours, gradient) <= tolerance, config
    for i, config in enumerate(exact):
        network.zero_grad(set_to_none=True)
        reference_loss(*(network(x) for x in given["inputs"]), config)[0].backward()
        for rank in ranks:
            for ours, parameter in zip(rank["parameters"][i], network.parameters(), strict=True):
                assert (ours - parameter.grad).norm() <= 1e-10 * parameter.grad.norm() + 1e-13, config


def test_ranks_with_different_numbers_of_samples_are_refused_with_a_sentence(run_ranks, tmp_path) -> None:
    run_ranks(3, "loss_unequal.py", tmp_path)
    for algorithm in ALGORITHMS:
        for rank in range(3):
            sentence = (tmp_path / f"{algorithm}-{rank}.txt").read_text()
            assert sentence == (
                "The loss needs the same number of samples on every rank, not 4, 3, 2 on ranks 0 to 2; "
                "drop the last, smaller batch."
            )
