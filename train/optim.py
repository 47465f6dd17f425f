"""LARS, layer-wise adaptive rates for large batches (You et al. 2017), as the Barlow Twins authors use it.

The step of each weight tensor is rescaled to a share `eta` of the tensor's own norm. Biases and norm
parameters get neither that nor weight decay.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.config import OptimConfig
from train.schedule import LearningRates


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

    1. weight decay   g = g + weight_decay * p
    2. adaptation     g = g * eta * |p| / |g|, unless one of the norms is 0; only in groups with `adapt`
    3. momentum       mu = momentum * mu + g
    4. step           p = p - lr * mu

    Works with `torch.amp.GradScaler`: call `scaler.unscale_` before `scaler.step`. Where the scaler has found
    a non-finite gradient, the step leaves p and mu as they are, without a wait for the host.
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

    def set_rates(self, rates: LearningRates) -> None:
        """Set the rates of the two groups of `build_optimizer`."""
        weights, biases = self.param_groups
        weights["lr"], biases["lr"] = rates.weights, rates.biases

    @torch.no_grad()
    def step(self) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            self._step_group(group, skip=None if found_inf is None else found_inf > 0)

    def _step_group(self, group: dict[str, Any], skip: Tensor | None) -> None:
        """One step of one group; `skip` (0-d bool on the device) makes it change nothing."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if "mu" not in self.state[p]:
                self.state[p]["mu"] = torch.zeros_like(p)
        momenta = [self.state[p]["mu"] for p in params]

        updates = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])  # 1
        if group["adapt"]:  # 2
            updates = torch._foreach_mul(updates, _adaptations(params, updates, group["eta"]))
        if skip is None:
            torch._foreach_mul_(momenta, group["momentum"])  # 3
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])  # 4
        else:
            for p, mu, update in zip(params, momenta, updates, strict=True):
                mu.copy_(torch.where(skip, mu, mu * group["momentum"] + update))  # 3
                p.copy_(torch.where(skip, p, p - group["lr"] * mu))  # 4


def _adaptations(params: Sequence[Tensor], updates: Sequence[Tensor], eta: float) -> list[Tensor]:
    """For each tensor the factor (0-d) that makes its update `eta` times as long as itself."""
    param_norms = torch.stack(torch._foreach_norm(params))
    update_norms = torch.stack(torch._foreach_norm(updates))
    usable = (param_norms > 0) & (update_norms > 0)
    return list(torch.where(usable, eta * param_norms / update_norms, 1.0).unbind())
