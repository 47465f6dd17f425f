"""The Barlow Twins authors' training step, in our own words, to compare with; it shares no code with ours.

It follows facebookresearch/barlowtwins, main.py: network, loss, LARS and learning rates, in the precision
of the weights. Several ranks are threads of this process. They share one set of weights, which would be
equal on all of them anyway, and each differentiates the loss of its own rows.

Shape legend: W ranks, V views (2), N samples of the global batch, n of a rank, C channels, D embedding width.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torchvision
from torch import Tensor, nn

Result = TypeVar("Result")


class Ranks:
    """`size` threads that can add tensors up."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._parts: list[Tensor] = [torch.empty(0)] * size
        self._thread = threading.local()

    @property
    def rank(self) -> int:
        """Of the calling thread."""
        return getattr(self._thread, "rank", 0)

    def run(self, body: Callable[[], Result]) -> list[Result]:
        """What `body` returns on each rank."""
        results: list[Any] = [None] * self.size

        def work(rank: int) -> None:
            self._thread.rank = rank
            try:
                results[rank] = body()
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`."""
        self._parts[self.rank] = x
        self._barrier.wait()
        total = torch.stack(self._parts).sum(0)
        self._barrier.wait()
        return total


class _SyncBatchNorm(torch.autograd.Function):
    """As in torch's layer of that name: statistics, and the sums of the backward pass, over all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_C: Tensor, bias_C: Tensor, norm: "AuthorsNorm") -> Tensor:
        ranks, rows = norm.ranks, [dim for dim in range(x.dim()) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        count = x.numel() // x.shape[1] * ranks.size
        mean_C = ranks.sum(x.sum(rows)) / count
        centred = x - mean_C.view(shape)
        var_C = ranks.sum(centred.square().sum(rows)) / count
        rstd_C = 1 / torch.sqrt(var_C + norm.eps)
        normalised = centred * rstd_C.view(shape)
        if ranks.rank == 0:
            norm.track(mean_C, var_C * count / (count - 1))
        ctx.save_for_backward(normalised, weight_C, rstd_C)
        ctx.over = ranks, rows, shape, count
        return normalised * weight_C.view(shape) + bias_C.view(shape)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        normalised, weight_C, rstd_C = ctx.saved_tensors
        ranks, rows, shape, count = ctx.over
        dweight_C, dbias_C = (dy * normalised).sum(rows), dy.sum(rows)  # of this rank alone
        mean_2C = ranks.sum(torch.stack([dweight_C, dbias_C])) / count
        dx = dy - mean_2C[1].view(shape) - normalised * mean_2C[0].view(shape)
        return dx * (weight_C * rstd_C).view(shape), dweight_C, dbias_C, None


class AuthorsNorm(nn.BatchNorm2d):
    """Batch-norm of (n, C) or (n, C, H, W); over several ranks, what `SyncBatchNorm` computes."""

    def __init__(self, ranks: Ranks, width: int, affine: bool = True) -> None:
        super().__init__(width, affine=affine)
        self.ranks = ranks

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.ranks.size == 1:
            return super().forward(input)
        ones_C = torch.ones_like(self.running_mean)
        weight_C, bias_C = (self.weight, self.bias) if self.affine else (ones_C, torch.zeros_like(ones_C))
        return _SyncBatchNorm.apply(input, weight_C, bias_C, self)

    @torch.no_grad()
    def track(self, mean_C: Tensor, var_C: Tensor) -> None:
        self.running_mean.mul_(1 - self.momentum).add_(mean_C, alpha=self.momentum)
        self.running_var.mul_(1 - self.momentum).add_(var_C, alpha=self.momentum)
        self.num_batches_tracked += 1

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class BarlowTwins(nn.Module):
    """Torchvision's ResNet without classifier, the projector, and a batch-norm of the embeddings."""

    def __init__(self, backbone: str, widths: Sequence[int], ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks = ranks or Ranks(1)
        norm = partial(AuthorsNorm, self.ranks)
        self.backbone = getattr(torchvision.models, backbone)(zero_init_residual=True, norm_layer=norm)
        sizes = [self.backbone.fc.in_features, *widths]
        self.backbone.fc = nn.Identity()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(fan_in, fan_out, bias=False), norm(fan_out), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers, nn.Linear(*sizes[-2:], bias=False))
        self.bn = norm(sizes[-1], affine=False)

    def forward(self, view_a_nCHW: Tensor, view_b_nCHW: Tensor, batch_size: int, lambd: float) -> Tensor:
        """The loss; its gradient knows nothing of the sum over ranks."""
        z_a_nD, z_b_nD = (self.projector(self.backbone(view)) for view in (view_a_nCHW, view_b_nCHW))
        c_DD = self.bn(z_a_nD).T @ self.bn(z_b_nD)
        c_DD.div_(batch_size)
        c_DD.detach().copy_(self.ranks.sum(c_DD.detach()))
        on_diagonal = (c_DD.diagonal() - 1).square().sum()
        return on_diagonal + lambd * (c_DD - c_DD.diagonal().diag()).square().sum()


class Wrapped(nn.Module):
    """Gives state dicts the names that `DistributedDataParallel` gives them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class AuthorsLars(torch.optim.Optimizer):
    """Weights are the first group, biases and batch-norm parameters the second one."""

    def __init__(self, model: nn.Module, weight_decay: float = 1e-6) -> None:
        weights = [p for p in model.parameters() if p.ndim != 1]
        biases = [p for p in model.parameters() if p.ndim == 1]
        # Both filters spare tensors of one dimension.
        filters = {"weight_decay_filter": True, "lars_adaptation_filter": True}
        options = {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.9, "eta": 0.001, **filters}
        super().__init__([{"params": weights}, {"params": biases}], options)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim != 1 or not group["weight_decay_filter"]:
                    update = update + group["weight_decay"] * p
                if p.ndim != 1 or not group["lars_adaptation_filter"]:
                    norm, update_norm = p.norm(), update.norm()
                    if norm > 0 and update_norm > 0:
                        update = update * (group["eta"] * norm / update_norm)
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p -= group["lr"] * state["mu"]


@dataclass
class AuthorsRun:
    """Network and optimiser, and the numbers that their command line has."""

    model: BarlowTwins
    optimizer: AuthorsLars
    batch_size: int
    epochs: int
    steps_per_epoch: int
    lambd: float = 0.0051
    lr_weights: float = 0.2
    lr_biases: float = 0.0048

    def train(self, views_VNCHW: Tensor, step: int) -> float:
        """One global batch, each rank's rows one after the other, as global step `step`; the loss."""
        self._adjust_learning_rates(step)
        ranks, parameters = self.model.ranks, list(self.model.parameters())
        rows = views_VNCHW.chunk(ranks.size, 1)

        def differentiate() -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = self.model(*rows[ranks.rank], self.batch_size, self.lambd)
            return loss.detach(), torch.autograd.grad(loss, parameters)

        losses, gradients = zip(*ranks.run(differentiate), strict=True)
        for p, parts in zip(parameters, zip(*gradients, strict=True), strict=True):
            p.grad = sum(parts) / ranks.size  # what `DistributedDataParallel` does
        self.optimizer.step()
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        return losses[0].item()

    def _adjust_learning_rates(self, step: int) -> None:
        steps, warmup = self.epochs * self.steps_per_epoch, 10 * self.steps_per_epoch
        base = self.batch_size / 256
        if step < warmup:
            rate = base * step / warmup
        else:
            share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            rate = base * share + base * 0.001 * (1 - share)
        weights, biases = self.optimizer.param_groups
        weights["lr"], biases["lr"] = rate * self.lr_weights, rate * self.lr_biases
