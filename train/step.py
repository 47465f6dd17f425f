"""One training step: distort, forward, loss, backward, optimiser.

The host queues all of it on the device and waits for none, with two exceptions on several GPUs: the forward
pass of torch's `SyncBatchNorm` asks the device, layer by layer, which ranks have samples, and the loss asks
at the first step whether all have equally many.

Shape legend: V views (2), N samples of this rank, C colours (3), H and W pixels, D embedding width.
"""

from collections.abc import Callable

import torch
from torch import nn

from model.collectives import world_size
from model.loss import BarlowLoss, barlow_loss
from pipelines.augment import distort
from pipelines.batch import Batch
from train.config import RunConfig
from train.optim import Lars, build_optimizer
from train.schedule import learning_rates

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PHASES = ("augment", "forward", "loss", "backward", "optimizer")


class TrainStep:
    """The step of one rank, and the state that it changes: network, optimiser and gradient scaler.

    `network` is a `Twin`, or what wraps one, on the device in channels-last format. `mark` is called with the
    name of each of `PHASES` after the step has queued that phase's work.
    """

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        steps_per_epoch: int,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.network = network
        self._device = next(network.parameters()).device
        self.optimizer: Lars = build_optimizer(network, config.train.optim)
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=config.train.precision == "fp16")
        self._config = config
        self._dtype = DTYPES[config.train.precision]
        self._steps_per_epoch = steps_per_epoch
        self._mark = mark
        # Each rank's loss has the gradient of the global loss with respect to its own samples. Data-parallel
        # training averages these over the ranks although their sum is the true gradient, hence world_size.
        # The authors' code lacks that factor, and their published run had 16 ranks: a
        # reference_world_size of 16 gives its gradient on any number of ranks.
        self._gradient_share = world_size() / config.model.loss.reference_world_size

    def __call__(self, batch: Batch, step: int) -> BarlowLoss:
        """Train on one batch as global step `step` (from 0); the loss comes back detached, on the device."""
        views_VNCHW = distort(batch.views_VNHWC, batch.params, self._config.data.augment, self._dtype)
        self._mark("augment")

        use_autocast = self._dtype is not torch.float32
        with torch.autocast(self._device.type, self._dtype, enabled=use_autocast):
            z_a_ND, z_b_ND = self.network(views_VNCHW)
        self._mark("forward")

        loss = barlow_loss(z_a_ND, z_b_ND, self._config.model.loss)  # in float32
        self._mark("loss")

        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss.total * self._gradient_share).backward()
        self._mark("backward")

        self._set_learning_rates(step)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._mark("optimizer")
        return BarlowLoss(*(term.detach() for term in loss))

    def _set_learning_rates(self, step: int) -> None:
        train = self._config.train
        rates = learning_rates(
            step,
            train.optim,
            batch_size=train.batch_size,
            steps_per_epoch=self._steps_per_epoch,
            epochs=train.epochs,
        )
        self.optimizer.set_rates(rates)
