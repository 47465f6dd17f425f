"""`model.norm: apex` with a stand-in for apex that has its interface, its layout and its pitfalls."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from model.config import ModelConfig
from model.errors import ModelError
from model.norm import ApexBatchNorm, TwinBatchNorm, joined_views
from model.twin import Twin


class _Statistics(torch.autograd.Function):
    """Batch-norm whose backward pass reads the mean and 1 / std from memory of the layer, as apex's does."""

    @staticmethod
    def forward(ctx, x_RC: Tensor, weight_C: Tensor, bias_C: Tensor, layer: "BatchNorm2d_NHWC") -> Tensor:
        var_C, mean_C = torch.var_mean(x_RC.float(), 0, correction=0)
        layer.minibatch_mean.data.copy_(mean_C)
        layer.minibatch_riv.data.copy_(torch.rsqrt(var_C + layer.eps))
        ctx.save_for_backward(x_RC, weight_C)
        ctx.statistics = layer.minibatch_mean, layer.minibatch_riv
        layer.running_mean.lerp_(mean_C, layer.momentum)
        layer.running_var.lerp_(var_C * len(x_RC) / (len(x_RC) - 1), layer.momentum)
        return batch_norm(x_RC, None, None, weight_C, bias_C, True, 0.0, layer.eps)

    @staticmethod
    def backward(ctx, dy_RC: Tensor) -> tuple[Tensor | None, ...]:
        x_RC, weight_C = ctx.saved_tensors
        mean_C, rstd_C = ctx.statistics
        gradients = torch.ops.aten.native_batch_norm_backward(
            dy_RC.contiguous(), x_RC, weight_C, None, None, mean_C, rstd_C, True, 1e-5, [True] * 3
        )
        return *gradients, None


class BatchNorm2d_NHWC(nn.modules.batchnorm._BatchNorm):  # noqa: N801 (apex's name)
    """Constructor, arguments of `forward`, layout and type as in apex."""

    built: list[dict] = []  # noqa: RUF012

    def __init__(self, num_features: int, fuse_relu: bool = False, bn_group: int = 1) -> None:
        super().__init__(num_features)
        self.built.append({"fuse_relu": fuse_relu, "bn_group": bn_group})
        self.fuse_relu = fuse_relu
        self.minibatch_mean = torch.empty(num_features)
        self.minibatch_riv = torch.empty(num_features)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert x.dtype == torch.float16 and x.is_contiguous() and x.shape[-1] == self.num_features
        assert self.training and (z is None or (self.fuse_relu and z.is_contiguous() and z.shape == x.shape))
        rows = x.reshape(-1, x.shape[-1])
        y = _Statistics.apply(rows, self.weight, self.bias, self).view(x.shape)
        y = y if z is None else y + z
        return y.relu() if self.fuse_relu else y


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> type[BatchNorm2d_NHWC]:
    names = ["apex", "apex.contrib", "apex.contrib.groupbn", "apex.contrib.groupbn.batch_norm"]
    for name in names:
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(sys.modules[parent], child, module)
    module.BatchNorm2d_NHWC = BatchNorm2d_NHWC
    monkeypatch.setattr(BatchNorm2d_NHWC, "built", [])
    return BatchNorm2d_NHWC


@pytest.mark.parametrize("form", ["plain", "relu", "residual"])
def test_apex_norm_equals_twin_norm(apex: type[BatchNorm2d_NHWC], form: str) -> None:
    torch.manual_seed(0)
    ours = ApexBatchNorm(5, relu=form != "plain")
    nn.init.uniform_(ours.weight, 0.5, 1.5)
    twin = TwinBatchNorm(5, relu=form != "plain")
    twin.load_state_dict(ours.state_dict())
    x, residual, dy = (torch.randn(3, 6, 5, 7, 3) + 1).half()
    x[:3] *= 3
    results = []
    for norm in (ours, twin):
        leaves = [t.clone(memory_format=torch.channels_last).requires_grad_() for t in (x, residual)]
        with joined_views([norm], 2):
            y = norm(*leaves[: 2 if form == "residual" else 1])
        y.backward(dy * (y.abs() > 0.05))
        assert y.is_contiguous(memory_format=torch.channels_last)
        gradients = [t.grad for t in [*leaves, *norm.parameters()] if t.grad is not None]
        results.append([y.detach(), *gradients, *norm.state_dict().values()])
    torch.testing.assert_close(*results, rtol=5e-3, atol=5e-3)
    assert apex.built == [{"fuse_relu": form != "plain", "bn_group": 1}]
    images = torch.randn(4, 5, 3, 3)
    assert torch.equal(ours.eval()(images), ours.eval()(images))  # evaluation needs neither float16 nor apex
    assert len(apex.built) == 1


def test_twin_with_apex_has_the_state_of_every_other(apex: type[BatchNorm2d_NHWC]) -> None:
    torch.manual_seed(0)
    config = {"backbone": "resnet18", "small_stem": True, "projector": "8-8"}
    twin = Twin(ModelConfig(norm="apex", **config))
    views = torch.randn(2, 3, 3, 16, 16)
    with torch.autocast("cpu", torch.float16):
        z_a, z_b = twin(views)
    (z_a - z_b).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in twin.parameters())
    other = Twin(ModelConfig(**config))
    other.load_state_dict(twin.state_dict())
    torch.testing.assert_close(other.eval()(views), twin.eval()(views))


def test_what_apex_cannot_do_is_one_sentence(apex: type[BatchNorm2d_NHWC], monkeypatch) -> None:
    norm = ApexBatchNorm(5)
    with pytest.raises(ModelError, match=r"^apex's[^\n]*not in bfloat16[^\n]*model\.norm to twin\.$"):
        norm(torch.zeros(4, 5, 2, 2, dtype=torch.bfloat16))
    norm.synchronised = True
    monkeypatch.setattr("model.norm.apex_norm.world_size", lambda: 3)
    with pytest.raises(ModelError, match=r"^apex's[^\n]*not over 3[^\n]*\.$"):
        norm(torch.zeros(4, 5, 2, 2).half())
    monkeypatch.setattr("model.norm.apex_norm.world_size", lambda: 4)
    norm(torch.zeros(4, 5, 2, 2).half())
    assert apex.built[-1]["bn_group"] == 4

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no GPU\nat all")

    monkeypatch.setattr(sys.modules["apex.contrib.groupbn.batch_norm"], "BatchNorm2d_NHWC", fail)
    with pytest.raises(ModelError, match=r"^apex's batch-norm does not start \(no GPU\)[^\n]*\.$"):
        ApexBatchNorm(5)(torch.zeros(4, 5, 2, 2).half())


def test_missing_apex_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ModelError, match=r"^model\.norm apex needs apex\.contrib\.groupbn[^\n]*to twin\.$"):
        Twin(ModelConfig(backbone="resnet18", norm="apex"))
