"""The loss: every algorithm equals the definition, in values and gradients, on one process and on ranks."""

import pytest
import torch

from model.config import LossConfig
from model.errors import ModelError
from model.loss import ALGORITHMS, barlow_loss
from model.loss.plan import choose_algorithm
from model.loss.reference import cross_correlation, reference_loss

SHAPES = [(2, 3), (7, 5), (5, 7), (33, 17), (64, 129)]


def embeddings(n: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """Correlated views with uneven means and scales, as real embeddings have."""
    generator = torch.Generator().manual_seed(1000 * n + width + seed)
    shared = torch.randn(n, width, generator=generator, dtype=dtype)
    scale = torch.rand(width, generator=generator, dtype=dtype) * 3
    return [
        (shared + 0.5 * torch.randn(n, width, generator=generator, dtype=dtype)) * scale + 2 * scale
        for _ in range(2)
    ]


def value_and_gradients(loss_of, z_a, z_b):
    z_a, z_b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    terms = loss_of(z_a, z_b)
    terms[0].backward()
    return [t.detach() for t in terms], z_a.grad, z_b.grad


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_every_algorithm_equals_the_definition_in_float64(algorithm: str, n: int, width: int) -> None:
    config = LossConfig(algorithm=algorithm, off_diagonal_weight=0.03)
    z_a, z_b = embeddings(n, width)
    terms, grad_a, grad_b = value_and_gradients(lambda a, b: barlow_loss(a, b, config), z_a, z_b)
    expected, expected_a, expected_b = value_and_gradients(lambda a, b: reference_loss(a, b, 0.03), z_a, z_b)
    torch.testing.assert_close(terms, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad_a, expected_a, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad_b, expected_b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_float32_is_no_further_from_float64_than_the_plain_definition_in_float32(algorithm: str) -> None:
    config = LossConfig(algorithm=algorithm)
    z_a, z_b = embeddings(96, 512)
    truth, truth_a, _ = value_and_gradients(lambda a, b: reference_loss(a, b, 0.0051), z_a, z_b)
    z_a, z_b = z_a.float(), z_b.float()
    ours, ours_a, _ = value_and_gradients(lambda a, b: barlow_loss(a, b, config), z_a, z_b)
    plain, plain_a, _ = value_and_gradients(lambda a, b: reference_loss(a, b, 0.0051), z_a, z_b)
    assert (ours[0] - truth[0]).abs() <= 2 * (plain[0] - truth[0]).abs() + 1e-6 * truth[0]
    assert (ours_a - truth_a).norm() <= 2 * (plain_a - truth_a).norm() + 1e-7 * truth_a.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_agrees_with_finite_differences(algorithm: str) -> None:
    config = LossConfig(algorithm=algorithm, off_diagonal_weight=0.1)
    z_a, z_b = (z.requires_grad_() for z in embeddings(6, 4))
    assert torch.autograd.gradcheck(lambda a, b: barlow_loss(a, b, config).total, (z_a, z_b))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_is_float32_inside_autocast(algorithm: str) -> None:
    config = LossConfig(algorithm=algorithm)
    z_a, z_b = (z.bfloat16() for z in embeddings(16, 24))
    with torch.autocast("cpu", torch.bfloat16):
        loss = barlow_loss(z_a, z_b, config)
    expected = reference_loss(z_a.float(), z_b.float(), config.off_diagonal_weight)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(list(loss), list(expected), rtol=1e-5, atol=1e-5)


def test_identical_whitened_views_have_the_smallest_loss() -> None:
    columns, _ = torch.linalg.qr(torch.cat([torch.ones(64, 1), torch.randn(64, 8)], 1).double())
    z = columns[:, 1:] * 1e4  # orthogonal to the ones, so centred; scaled so that eps does not matter
    loss = barlow_loss(z, z, LossConfig())
    torch.testing.assert_close(list(loss), [torch.zeros((), dtype=torch.float64)] * 3, rtol=0, atol=1e-9)


def test_authors_formula_gives_the_same_value() -> None:
    z_a, z_b = embeddings(32, 24)
    norm = torch.nn.BatchNorm1d(24, affine=False, dtype=torch.float64)
    c = norm(z_a).T @ norm(z_b) / 32
    torch.testing.assert_close(cross_correlation(z_a, z_b), c)
    off_diagonal = c.flatten()[:-1].view(23, 25)[:, 1:].flatten()
    total = (c.diagonal() - 1).square().sum() + 0.0051 * off_diagonal.square().sum()
    torch.testing.assert_close(barlow_loss(z_a, z_b, LossConfig()).total, total)


def test_auto_takes_gram_for_wide_embeddings_and_dense_for_large_batches() -> None:
    assert choose_algorithm(2048, 8192) == "gram"
    assert choose_algorithm(8192, 8192) == "dense"


@pytest.mark.parametrize(
    ("shape_a", "shape_b"), [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((1, 3), (1, 3)), ((2, 3, 4), (2, 3, 4))]
)
def test_unfit_embeddings_are_refused_with_a_sentence(shape_a: tuple, shape_b: tuple) -> None:
    with pytest.raises(ModelError, match=r"^The loss .*\.$"):
        barlow_loss(torch.randn(shape_a), torch.randn(shape_b), LossConfig())


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_different_data_get_the_global_loss_and_its_exact_gradient(
    world_size: int, run_ranks, tmp_path
) -> None:
    z_a, z_b = embeddings(6 * world_size, 11)
    torch.save((z_a, z_b), tmp_path / "z.pt")
    run_ranks(world_size, "loss.py", tmp_path)
    expected, expected_a, expected_b = value_and_gradients(
        lambda a, b: reference_loss(a, b, LossConfig().off_diagonal_weight), z_a, z_b
    )
    for algorithm in ALGORITHMS:
        results = [torch.load(tmp_path / f"{algorithm}-{rank}.pt") for rank in range(world_size)]
        for terms, _, _ in results:
            torch.testing.assert_close(terms, expected, rtol=1e-11, atol=1e-11)
        grad_a, grad_b = (torch.cat([result[i] for result in results]) for i in (1, 2))
        torch.testing.assert_close(grad_a, expected_a, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(grad_b, expected_b, rtol=1e-9, atol=1e-11)
