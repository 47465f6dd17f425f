"""The authors' training step, to compare with: their formulation in our own words.

Each view is a pass of its own through torchvision's ResNet, in contiguous format; then their loss, and LARS
as a loop over all tensors. On one GPU their code also wraps the network in `DistributedDataParallel` and asks
for `SyncBatchNorm`, which have nothing to exchange there; both are left out, in their favour.

Shape legend: V views (2), N samples, C colours (3), H and W pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.twin import Twin
from tools.bench.authors import AuthorsLoss
from train.config import RunConfig
from train.schedule import learning_rates
from train.step import DTYPES


def authors_precision(config: RunConfig, device: torch.device) -> str:
    """What their step computes in: fp16 on GPUs where ours takes half precision too, else ours."""
    is_half = DTYPES[config.train.precision].itemsize == 2
    return "fp16" if is_half and device.type == "cuda" else config.train.precision


class AuthorsStep:
    """Their step from float32 views that are on the device already; weights are drawn as ours are.

    Of the config it takes network, precision, batch size, optimiser and lambda; of the loss nothing else.
    `mark` is called with the name of each phase after the host has queued its work: forward, loss, backward
    and optimizer.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        steps_per_epoch: int,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> None:
        model, train = config.model, config.train
        torch.manual_seed(config.seed)
        self.network = Twin(model.model_copy(update={"norm": "torch"})).to(device)
        width = model.projector_widths[-1]
        self.loss = AuthorsLoss(width, train.batch_size, model.loss.off_diagonal_weight, device)
        self.optimizer = AuthorsLars(
            self.network, train.optim.weight_decay, train.optim.momentum, train.optim.eta
        )
        precision = authors_precision(config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._device, self._dtype = device, DTYPES[precision]
        self._train, self._steps_per_epoch, self._mark = train, steps_per_epoch, mark

    def __call__(self, views_VNCHW: Tensor, step: int) -> Tensor:
        """Train on one batch as global step `step` (from 0); the total loss, detached, on the device."""
        self._set_learning_rates(step)
        self.optimizer.zero_grad()
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not torch.float32):
            z_a_ND, z_b_ND = self.network(views_VNCHW)
            self._mark("forward")
            total = self.loss(z_a_ND, z_b_ND)
        self._mark("loss")
        self.scaler.scale(total).backward()
        self._mark("backward")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._mark("optimizer")
        return total.detach()

    def _set_learning_rates(self, step: int) -> None:
        train = self._train
        rates = learning_rates(
            step,
            train.optim,
            batch_size=train.batch_size,
            steps_per_epoch=self._steps_per_epoch,
            epochs=train.epochs,
        )
        for group, rate in zip(self.optimizer.param_groups, (rates.weights, rates.biases), strict=True):
            group["lr"] = rate


class AuthorsLars(torch.optim.Optimizer):
    """LARS, one tensor after the other; tensors of one dimension get neither adaptation nor weight decay."""

    def __init__(self, module: nn.Module, weight_decay: float, momentum: float, eta: float) -> None:
        weights = [p for p in module.parameters() if p.ndim != 1]
        biases = [p for p in module.parameters() if p.ndim == 1]
        defaults = {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        super().__init__([{"params": weights}, {"params": biases}], defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        update = p.grad
        if p.ndim != 1:
            update = update.add(p, alpha=group["weight_decay"])
            weight_norm, update_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
            one = torch.ones_like(weight_norm)
            factor = torch.where(update_norm > 0, group["eta"] * weight_norm / update_norm, one)
            update = update.mul(torch.where(weight_norm > 0, factor, one))
        if "mu" not in self.state[p]:
            self.state[p]["mu"] = torch.zeros_like(p)
        mu = self.state[p]["mu"]
        mu.mul_(group["momentum"]).add_(update)
        p.add_(mu, alpha=-group["lr"])
