"""Batch-norm of joined views equals torch's own, view by view, in values, gradients and buffers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, relu

from model.errors import ModelError
from model.norm import TwinBatchNorm, joined_views, synchronise_norms

FORMS = ["plain", "relu", "residual"]
SHAPES = [(6, 5, 7, 3), (6, 5), (4, 8, 1, 1), (2, 3, 4, 4)]
forms = pytest.mark.parametrize("form", FORMS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make_norm(channels: int, form: str, **options: object) -> TwinBatchNorm:
    """A norm with random weights and running statistics."""
    norm = TwinBatchNorm(channels, relu=form != "plain", **options)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def theirs_of(norm: TwinBatchNorm) -> nn.BatchNorm2d | nn.BatchNorm1d:
    theirs = nn.BatchNorm2d(norm.num_features).to(norm.running_mean)
    theirs.load_state_dict(norm.state_dict())
    theirs._check_input_dim = lambda input: None  # serves (N, C) as well
    return theirs.train(norm.training)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x with means far from zero, differing between views; a residual; a gradient. All channels-last."""
    x, residual, dy = torch.randn(3, *shape, dtype=torch.float64)
    x = x * 3 + 2
    x[: len(x) // 2] *= 1.7
    x[:, 1] += 100
    tensors = [t.to(dtype) for t in (x, residual, dy)]
    if len(shape) == 4:
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    return tensors[0], tensors[1], tensors[2]


def torch_passes(
    norm: nn.Module, form: str, x: Tensor, residual: Tensor, dy: Tensor, num_views: int
) -> tuple[Tensor, ...]:
    """Output and gradients of passes view by view."""
    x, residual = (t.clone().requires_grad_() for t in (x, residual))
    outputs = []
    for x_v, residual_v in zip(x.chunk(num_views), residual.chunk(num_views), strict=True):
        y = norm(x_v)
        if form == "residual":
            y = y + residual_v
        outputs.append(y if form == "plain" else relu(y))
    y = torch.cat(outputs)
    y.backward(dy)
    dresidual = residual.grad if form == "residual" else torch.zeros_like(x)
    return y.detach(), x.grad, dresidual, norm.weight.grad, norm.bias.grad


def joined_pass(
    norm: TwinBatchNorm, form: str, x: Tensor, residual: Tensor, dy: Tensor, num_views: int
) -> tuple[Tensor, ...]:
    x, residual = (t.clone().requires_grad_() for t in (x, residual))
    with joined_views([norm], num_views):
        y = norm(x, residual if form == "residual" else None)
    y.backward(dy)
    dresidual = residual.grad if form == "residual" else torch.zeros_like(x)
    return y.detach(), x.grad, dresidual, norm.weight.grad, norm.bias.grad


@forms
@shapes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_joined_pass_equals_a_pass_for_each_view(
    shape: tuple[int, ...], form: str, training: bool, num_views: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(sum(shape))
    norm = make_norm(shape[1], form).to(dtype).train(training)
    theirs, inputs = theirs_of(norm), make_inputs(shape, dtype)
    ours = joined_pass(norm, form, *inputs, num_views)
    expected = torch_passes(theirs, form, *inputs, num_views)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, expected, **tolerance)
    torch.testing.assert_close(norm.state_dict(), theirs.state_dict(), **tolerance)
    assert norm.num_batches_tracked == (num_views if training else 0)


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_float32_statistics(form: str, dtype: torch.dtype) -> None:
    """No further from float64's result than rounding twice."""
    torch.manual_seed(1)
    norm, (x, residual, dy) = make_norm(5, form), make_inputs((6, 5, 9, 7), dtype)
    exact = make_norm(5, form).double()
    exact.load_state_dict(norm.state_dict())
    with joined_views([exact], 2), torch.no_grad():
        exact.relu, before_relu = False, exact(x.double())
        exact.relu = norm.relu
    exact.load_state_dict(norm.state_dict())
    if form == "residual":
        before_relu += residual
    dy[before_relu.abs() < 0.05] = 0  # rounding may decide here whether the gradient passes
    inputs = x, residual, dy
    ours = joined_pass(norm, form, *inputs, 2)
    expected = joined_pass(exact, form, *(t.double() for t in inputs), 2)
    assert [t.dtype for t in ours] == [dtype] * 3 + [torch.float32] * 2
    eps = torch.finfo(dtype).eps
    for actual, true in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual.double(), true, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(
        [norm.running_mean, norm.running_var],
        [exact.running_mean.float(), exact.running_var.float()],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("channels_last", [True, False])
def test_output_is_channels_last_and_any_layout_is_served(channels_last: bool) -> None:
    torch.manual_seed(2)
    x, _, _ = make_inputs((6, 5, 7, 3))
    norm = make_norm(5, "plain")
    y = norm(x if channels_last else x.contiguous())
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, batch_norm(x, None, None, norm.weight, norm.bias, True))


def test_joined_views_end_with_their_block() -> None:
    norm = TwinBatchNorm(3)
    with pytest.raises(RuntimeError, match="on purpose"), joined_views([norm], 2):
        assert norm.num_views == 2
        raise RuntimeError("on purpose")
    assert norm.num_views == 1


def test_constant_channels_and_large_means_stay_exact() -> None:
    """A variance from E[x^2] - E[x]^2 in float32 would be wrong by more than itself here."""
    torch.manual_seed(3)
    x = torch.randn(64, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    x[:, 0] = 3.5
    x[:, 1] += 4096
    norm = TwinBatchNorm(3, momentum=1.0)
    with joined_views([norm], 2):
        y = norm(x)
    assert (y[:, 0] == 0).all()
    last = x[32:].double()
    torch.testing.assert_close(
        norm.running_var.double(), last.transpose(0, 1).flatten(1).var(1), rtol=1e-4, atol=0
    )
    expected = batch_norm(last, None, None, training=True)
    torch.testing.assert_close(y[32:, 1:].double(), expected[:, 1:], rtol=0, atol=1e-3)


@forms
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    torch.manual_seed(4)
    norm = make_norm(3, form).double()
    x, residual, _ = make_inputs((4, 3, 3, 2), torch.float64)

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with joined_views([norm], 2):
            arguments = (x, residual) if form == "residual" else (x,)
            return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, arguments)

    inputs = [t.detach().clone().requires_grad_() for t in (x, residual, norm.weight, norm.bias)]
    assert torch.autograd.gradcheck(run, inputs)


def test_batches_without_statistics_are_refused() -> None:
    norm = TwinBatchNorm(4)
    with (
        pytest.raises(ModelError, match=r"^A batch of 2 joined views [^\n]*3 samples[^\n]*\.$"),
        joined_views([norm], 2),
    ):
        norm(torch.zeros(3, 4, 2, 2))
    with pytest.raises(ModelError, match=r"^Batch-norm needs more than one value per channel[^\n]*\.$"):
        norm(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ModelError, match="more than one value per channel"), joined_views([norm], 2):
        norm(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="relu=True"):
        norm(torch.zeros(2, 4), torch.zeros(2, 4))
    norm.eval()(torch.zeros(1, 4, 1, 1))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_norm_over_ranks_equals_one_process_with_the_whole_batch(
    run_ranks, tmp_path, world_size: int
) -> None:
    """And each layer has one collective in each direction, whatever the views."""
    torch.manual_seed(5)
    network = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 5, 3),
            "relu": make_norm(5, "relu"),
            "plain": make_norm(5, "plain"),
            "residual": make_norm(5, "residual"),
            "linear": nn.Linear(5, 7),
            "flat": make_norm(7, "relu"),
        }
    ).double()
    views_VNCHW = (torch.randn(2, 6, 3, 7, 5) * 2 + 1).double()
    weights_VND = torch.randn(2, 6, 7).double()
    given = {"network": network, "views": views_VNCHW, "weights": weights_VND}
    torch.save(given, tmp_path / "given.pt")
    run_ranks(world_size, "norm.py", tmp_path)
    results = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(world_size)]

    norms = [module for module in network.values() if isinstance(module, TwinBatchNorm)]
    views_VNCHW.requires_grad_()
    outputs = []
    for view_NCHW in views_VNCHW:
        first = network["relu"](network["conv"](view_NCHW))
        third = network["residual"](network["plain"](first), first)
        outputs.append(network["flat"](network["linear"](third.mean((2, 3)))))
    z_VND = torch.stack(outputs)
    (z_VND * weights_VND).sum().backward()
    exactly = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([r["z"] for r in results], 1), z_VND.detach(), **exactly)
    torch.testing.assert_close(torch.cat([r["dviews"] for r in results], 1), views_VNCHW.grad, **exactly)
    for result in results:
        torch.testing.assert_close(result["dparameters"], [p.grad for p in network.parameters()], **exactly)
        torch.testing.assert_close(result["state"], network.state_dict(), **exactly)
        calls = len(norms) if world_size > 1 else 0
        assert result["collectives"] == {"forward": calls, "backward": calls}


def test_torchs_own_norms_are_synchronised_too() -> None:
    torch.manual_seed(6)
    module = nn.Sequential(nn.BatchNorm1d(9), nn.BatchNorm1d(9, affine=False))
    nn.init.uniform_(module[0].weight)
    nn.init.uniform_(module[0].running_mean)
    ours = nn.Sequential(nn.BatchNorm1d(9), nn.BatchNorm1d(9, affine=False))
    ours.load_state_dict(module.state_dict())
    synchronise_norms(ours)
    assert all(isinstance(norm, TwinBatchNorm) and norm.synchronised for norm in ours)
    x = torch.randn(13, 9) * 3 + 2
    torch.testing.assert_close(ours(x), module(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), module.state_dict(), rtol=1e-5, atol=1e-5)


def test_layers_between_can_be_compiled() -> None:
    torch.manual_seed(7)
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), make_norm(5, "relu"), nn.Conv2d(5, 4, 3), make_norm(4, "plain"))
    compiled = copy.deepcopy(plain)
    x = torch.randn(6, 3, 9, 7)
    for network, run in ((plain, plain), (compiled, torch.compile(compiled, backend="aot_eager"))):
        for _ in range(2):
            with joined_views([network[1], network[3]], 2):
                y = run(x)
            y.square().sum().backward()
    torch.testing.assert_close(list(plain.buffers()), list(compiled.buffers()))
    torch.testing.assert_close(*([p.grad for p in n.parameters()] for n in (plain, compiled)))
