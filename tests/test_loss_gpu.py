"""The loss on a GPU, by torch and by Triton: the definition's values, no waiting, no overflow."""

import pytest
import torch

from model.config import LossConfig
from model.loss import ALGORITHMS, barlow_loss
from model.loss.choose import IMPLEMENTATIONS
from model.loss.reference import reference_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Largest relative error of the gradient: that of the operands' precision.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def embeddings(n: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(n + width)
    shared = torch.randn(n, width, generator=generator, device="cuda")
    return [(shared + torch.randn(n, width, generator=generator, device="cuda")).to(dtype) for _ in range(2)]


def gradients(loss, z_a, z_b, config):
    z_a, z_b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    terms = loss(z_a, z_b, config)
    terms[0].backward()
    return terms, z_a.grad, z_b.grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("n", "width"), [(3, 5), (17, 127), (252, 507), (256, 2048), (507, 252)])
def test_gpu_gives_the_definitions_loss(implementation, algorithm, dtype, n, width) -> None:
    config = LossConfig(algorithm=algorithm, implementation=implementation)
    z_a, z_b = embeddings(n, width, dtype)
    truth, *true_gradients = gradients(reference_loss, z_a.double(), z_b.double(), config)
    terms, *ours = gradients(barlow_loss, z_a, z_b, config)
    assert abs(terms.total.item() / truth[0].item() - 1) <= TOLERANCES[dtype]
    for gradient, true_gradient in zip(ours, true_gradients, strict=True):
        error = (gradient.double() - true_gradient).norm() / true_gradient.norm()
        assert error <= TOLERANCES[dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_forward_and_backward_never_wait_for_the_gpu(implementation, algorithm) -> None:
    config = LossConfig(algorithm=algorithm, implementation=implementation)
    z_a, z_b = (z.requires_grad_() for z in embeddings(64, 128, torch.bfloat16))
    barlow_loss(z_a, z_b, config).total.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        barlow_loss(z_a, z_b, config).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("algorithm", ["gram", "sharded"])
def test_wide_collapsed_embeddings_do_not_overflow_in_float16(implementation, algorithm) -> None:
    column = torch.randn(2048, 1, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    z_a = column.expand(-1, 16384).half().contiguous()
    config = LossConfig(algorithm=algorithm, implementation=implementation)
    terms, grad_a, _ = gradients(barlow_loss, z_a, z_a, config)
    torch.testing.assert_close(terms.redundancy.item(), 16384.0 * 16383, rtol=2e-3, atol=0)
    assert grad_a.isfinite().all()
