"""Batch-norm over ranks equals one process that sees the whole batch."""

import pytest
import torch
from torch import nn

from model.norm import GlobalBatchNorm, synchronise_norms


def test_batch_norm_over_ranks_equals_one_process_with_the_whole_batch(run_ranks, tmp_path) -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5)).double()
    x = (torch.randn(6, 3, 7, 5) * 2 + 1).double()
    weight = torch.randn(6, 5, 5, 3).double()
    torch.save((module, x, weight), tmp_path / "norm.pt")
    run_ranks(2, "norm.py", tmp_path)
    results = [torch.load(tmp_path / f"norm-{rank}.pt") for rank in range(2)]

    x.requires_grad_()
    y = module(x)
    (y * weight).sum().backward()
    torch.testing.assert_close(torch.cat([r["y"] for r in results]), y.detach())
    torch.testing.assert_close(torch.cat([r["grad"] for r in results]), x.grad)
    for result in results:
        torch.testing.assert_close(result["parameter_grads"], [p.grad for p in module.parameters()])
        torch.testing.assert_close(result["state"], module.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_plain_norm_equals_torch_in_training_and_evaluation(training: bool) -> None:
    torch.manual_seed(4)
    module = nn.Sequential(nn.BatchNorm1d(9)).train(training)
    nn.init.uniform_(module[0].weight)
    nn.init.uniform_(module[0].running_mean)
    x = torch.randn(13, 9) * 3 + 2
    ours = nn.Sequential(nn.BatchNorm1d(9)).train(training)
    ours.load_state_dict(module.state_dict())
    synchronise_norms(ours)
    assert isinstance(ours[0], GlobalBatchNorm)
    torch.testing.assert_close(ours(x), module(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.state_dict(), module.state_dict(), rtol=1e-5, atol=1e-6)


def test_half_precision_input_keeps_its_precision() -> None:
    norm = synchronise_norms(nn.Sequential(nn.BatchNorm1d(4)))
    assert norm(torch.randn(8, 4).bfloat16()).dtype == torch.bfloat16
