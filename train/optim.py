"""LARS, layer-wise adaptive rates for large batches (You et al. 2017), as the Barlow Twins authors use it.

The step of each weight tensor is rescaled to a share `eta` of the tensor's own norm. Biases and norm
parameters get neither that nor weight decay.

Shape legend: T tensors of a group, R rows of `ROW` numbers in which all of them are laid out.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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


class _Prepared(NamedTuple):
    """Of one group: those of its tensors that have a gradient, and what to add to their momenta."""

    params: list[Tensor]
    updates: list[Tensor]  # in groups with `adapt` after step 1, elsewhere the gradients
    norms: Sequence[Tensor]  # of the updates; in groups with `adapt` those of the tensors before them
    matrix_Rx: Tensor | None = None  # in groups with `adapt`, what the updates are views of: a list of
    # factors, a 0-d tensor each, would be multiplied one by one


class Lars(torch.optim.Optimizer):
    """For each tensor p with gradient g and momentum mu (0 at first):

    1. weight decay   u = g + weight_decay * p
    2. adaptation     u = u * eta * |p| / |u|, unless one of the norms is 0; only in groups with `adapt`
    3. momentum       mu = momentum * mu + u
    4. step           p = p - lr * mu

    All tensors of a group go through each operation together, and the host waits for none, so a step costs
    the same few launches however many tensors there are. They must be dense, of one dtype and on one device.
    Besides the momenta it needs memory for a copy of the weights' gradients, on a GPU only while it runs.

    Where a gradient is not finite, the step leaves all p and mu as they are, and `skipped` (0-d float32 on
    the device) is 1 after it; else it is 0. Works with `torch.amp.GradScaler`: call `scaler.unscale_` before
    `scaler.step`.
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
        self.skipped: Tensor
        self._rates: list[Tensor] | None = None  # 0-d on the device, one for each group
        self._row_tensors: dict[tuple[int, ...], Tensor] = {}  # by sizes: the tensor of each row, int64 (R,)
        self._matrices: dict[int, Tensor] = {}  # by rows, on the CPU

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
    def step(self, skip: Tensor | None = None) -> None:
        """All groups take it, or none of them: `skip` (0-d bool on the device) is a reason for none."""
        prepared = [self._prepare(group) for group in self.param_groups]
        # A norm is finite only where all the numbers behind it are.
        norms = torch.stack([norm for group in prepared for norm in group.norms])
        has_failed = (norms.sum() < float("inf")).logical_not()
        self.skipped = (has_failed if skip is None else has_failed | skip).float()
        norms_of_groups = norms.split([len(group.norms) for group in prepared])
        for number, (group, (params, updates, _, matrix_Rx)) in enumerate(
            zip(self.param_groups, prepared, strict=True)
        ):
            if not params:
                continue
            if matrix_Rx is not None:
                norm_2T = norms_of_groups[number].view(2, -1)
                factor_T = torch.where((norm_2T > 0).all(0), group["eta"] * norm_2T[0] / norm_2T[1], 1.0)
                matrix_Rx.mul_(factor_T[self._rows_of(params)].unsqueeze(1))  # 2
            # Steps 3 and 4, and 1 for the others, are those of stochastic gradient descent.
            torch._fused_sgd_(
                params,
                updates,
                [self.state[p]["mu"] for p in params],
                lr=group["lr"] if self._rates is None else self._rates[number],
                momentum=group["momentum"],
                weight_decay=0.0 if group["adapt"] else group["weight_decay"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=self.skipped,
            )

    def _prepare(self, group: dict[str, Any]) -> _Prepared:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if "mu" not in self.state[p]:
                self.state[p]["mu"] = torch.zeros_like(p)
        grads = [_laid_out_like(p, p.grad) for p in params]
        if not group["adapt"] or not params:
            return _Prepared(params, grads, torch._foreach_norm(grads) if params else ())
        matrix_Rx = self._matrix(params)
        updates, start = [], 0
        for p in params:
            updates.append(matrix_Rx.as_strided(p.size(), p.stride(), start))
            start += _rows(p) * ROW
        torch._foreach_copy_(updates, grads)
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])  # 1
        return _Prepared(params, updates, torch._foreach_norm([*params, *updates]), matrix_Rx)

    def _rows_of(self, params: Sequence[Tensor]) -> Tensor:
        """For each row of the matrix of updates, which of `params` it belongs to: int64 (R,)."""
        sizes = tuple(_rows(p) for p in params)
        if sizes not in self._row_tensors:
            row_tensor_R = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            self._row_tensors[sizes] = row_tensor_R.to(params[0].device)
        return self._row_tensors[sizes]

    def _matrix(self, params: Sequence[Tensor]) -> Tensor:
        """Uninitialised. The CPU has no pool of memory, and fresh pages cost more than the arithmetic."""
        rows, like = len(self._rows_of(params)), params[0]
        if rows in self._matrices:
            return self._matrices[rows]
        matrix_Rx = like.new_empty(rows, ROW)
        if not like.is_cuda:
            self._matrices[rows] = matrix_Rx
        return matrix_Rx


def _rows(p: Tensor) -> int:
    return -(-p.numel() // ROW)


def _laid_out_like(p: Tensor, grad: Tensor) -> Tensor:
    """`grad` with the strides of `p`, which the joint operations need. Autograd's own gradients have them."""
    sides = zip(p.size(), p.stride(), grad.stride(), strict=True)
    if all(size == 1 or of_p == of_grad for size, of_p, of_grad in sides):
        return grad
    return torch.empty_like(p).copy_(grad)
