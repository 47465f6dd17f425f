"""LARS, layer-wise adaptive rates for large batches (You et al. 2017), as the Barlow Twins authors use it.

The step of each weight tensor is rescaled to a share `eta` of the tensor's own norm. Biases and norm
parameters get neither that nor weight decay.

Shape legend: T tensors of a group, R rows of `ROW` numbers in which all of them are laid out.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.config import OptimConfig
from train.schedule import LearningRates

ROW = 1024  # numbers; each tensor begins a row, so that a factor for each tensor is a factor for each row


def build_optimizer(module: nn.Module, config: OptimConfig) -> "Lars":
    """LARS over two groups: weights, then biases and norm parameters (all that has one dimension)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    weights = [p for p in parameters if p.ndim > 1]
    biases = [p for p in parameters if p.ndim <= 1]
    return Lars(
        [
            {"params": weights, "adapt": True, "weight_decay": config.weight_decay},
            {"params": biases, "adapt": False, "weight_decay": 0.0},
        ],
        momentum=config.momentum,
        eta=config.eta,
    )


class Lars(torch.optim.Optimizer):
    """For each tensor p with gradient g and momentum mu (0 at first):

    1. weight decay   u = g + weight_decay * p
    2. adaptation     u = u * eta * |p| / |u|, unless one of the norms is 0; only in groups with `adapt`
    3. momentum       mu = momentum * mu + u
    4. step           p = p - lr * mu

    On a GPU all tensors of a group go through each operation together, and the host waits for none, so a step
    costs the same few launches however many tensors there are; while it runs, it needs memory for a copy of
    the weights' gradients. On the CPU it takes one tensor after the other, while that is in the caches, and
    keeps memory for the largest. Tensors must be dense, of one dtype and on one device.

    Works with `torch.amp.GradScaler`: call `scaler.unscale_` before `scaler.step`. Where the scaler has found
    a non-finite gradient, the step leaves p and mu as they are.
    """

    # Tells GradScaler.step to set `found_inf` on the optimizer instead of reading it on the host.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": adapt}
        super().__init__(params, defaults)
        self._rates: list[Tensor] | None = None  # 0-d on the device, one for each group
        self._row_tensors: dict[tuple[int, ...], Tensor] = {}  # by sizes: the tensor of each row, int64 (R,)
        self._scratch: Tensor | None = None  # (rows of the largest tensor, ROW), on the CPU

    def keep_rates_on_device(self) -> None:
        """Read the rates from the device: a CUDA graph would repeat a number of the host for ever."""
        device = self.param_groups[0]["params"][0].device
        # The fused step reads them as float32 on a GPU and in full on the CPU.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._rates = [torch.tensor(g["lr"], dtype=dtype, device=device) for g in self.param_groups]

    def set_rates(self, rates: LearningRates) -> None:
        """Set the rates of the two groups of `build_optimizer`."""
        for number, rate in enumerate((rates.weights, rates.biases)):
            self.param_groups[number]["lr"] = rate
            if self._rates is not None:
                self._rates[number].fill_(rate)

    @torch.no_grad()
    def step(self) -> None:
        for number, group in enumerate(self.param_groups):
            lr = group["lr"] if self._rates is None else self._rates[number]
            self._step_group(group, lr)

    def _step_group(self, group: dict[str, Any], lr: float | Tensor) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for together in _split(params):
            self._step_together(together, group, lr)

    def _step_together(self, params: Sequence[Tensor], group: dict[str, Any], lr: float | Tensor) -> None:
        for p in params:
            if "mu" not in self.state[p]:
                self.state[p]["mu"] = torch.zeros_like(p)
        updates = [_laid_out_like(p, p.grad) for p in params]
        if group["adapt"]:
            updates = self._adapted(params, updates, group["weight_decay"], group["eta"])  # 1, 2
        # Steps 3 and 4, and 1 for the others, are those of stochastic gradient descent.
        torch._fused_sgd_(
            params,
            updates,
            [self.state[p]["mu"] for p in params],
            lr=lr,
            momentum=group["momentum"],
            weight_decay=0.0 if group["adapt"] else group["weight_decay"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=getattr(self, "found_inf", None),
        )

    def _adapted(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float, eta: float
    ) -> list[Tensor]:
        """The updates after steps 1 and 2.

        They are views of one matrix: a list of factors, a 0-d tensor each, would be multiplied one by one.
        """
        row_tensor_R = self._rows_of(params)
        matrix_Rx = self._matrix(len(row_tensor_R), params[0])
        updates, start = [], 0
        for p in params:
            updates.append(matrix_Rx.as_strided(p.size(), p.stride(), start))
            start += _rows(p) * ROW
        torch._foreach_copy_(updates, grads)
        torch._foreach_add_(updates, params, alpha=weight_decay)  # 1
        norm_2T = torch.stack(torch._foreach_norm([*params, *updates])).view(2, -1)
        factor_T = torch.where((norm_2T > 0).all(0), eta * norm_2T[0] / norm_2T[1], 1.0)
        matrix_Rx.mul_(factor_T[row_tensor_R].unsqueeze(1))  # 2
        return updates

    def _rows_of(self, params: Sequence[Tensor]) -> Tensor:
        """For each row of the matrix of updates, which of `params` it belongs to: int64 (R,)."""
        sizes = tuple(_rows(p) for p in params)
        if sizes not in self._row_tensors:
            row_tensor_R = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            self._row_tensors[sizes] = row_tensor_R.to(params[0].device)
        return self._row_tensors[sizes]

    def _matrix(self, rows: int, like: Tensor) -> Tensor:
        """Uninitialised. The CPU has no pool of memory, and fresh pages cost more than the arithmetic."""
        if like.is_cuda:
            return like.new_empty(rows, ROW)
        if self._scratch is None or len(self._scratch) < rows:
            self._scratch = like.new_empty(rows, ROW)
        return self._scratch[:rows]


def _split(params: list[Tensor]) -> list[list[Tensor]]:
    """Which of them are taken together."""
    return [params] if params and params[0].is_cuda else [[p] for p in params]


def _rows(p: Tensor) -> int:
    return -(-p.numel() // ROW)


def _laid_out_like(p: Tensor, grad: Tensor) -> Tensor:
    """`grad` with the strides of `p`, which the joint operations need. Autograd's own gradients have them."""
    sides = zip(p.size(), p.stride(), grad.stride(), strict=True)
    if all(size == 1 or of_p == of_grad for size, of_p, of_grad in sides):
        return grad
    return torch.empty_like(p).copy_(grad)
