"""One training step: distort, forward, loss, backward, optimiser.

The host queues all of it on the device and waits for none, with three exceptions on several GPUs: with
`model.norm` torch, the forward pass of torch's `SyncBatchNorm` asks the device, layer by layer, which ranks
have samples; the loss asks at the first step whether all have equally many; and to time its exchange of
gradients, `DistributedDataParallel` waits for the step before in the first ten steps and in each hundredth.

Shape legend: V views (2), N samples of this rank, k pieces of n = N / k samples, C colours (3), H and W
pixels, F feature width, D embedding width.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.collectives import world_size
from model.loss import BarlowLoss, barlow_loss
from pipelines.augment import distort
from pipelines.batch import Batch, ViewParams
from train.config import RunConfig
from train.errors import ConfigError
from train.graph import StepGraph
from train.optim import Lars, build_optimizer
from train.phases import phase_range
from train.schedule import learning_rates

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Up to this size the last stage of a ResNet begins with a 3x3 convolution of stride 2 on a single pixel,
# whose weight gradient in bf16 comes from memory that oneDNN 3.13 has not set.
WRONG_BF16_SIZE = 16
PHASES = ("augment", "forward", "loss", "backward", "optimizer")
COMPILED_VARIANTS = 64  # of one block: there are many widths, each with and without gradients


class TrainStep:
    """The step of one rank, and the state that it changes: network, optimiser and gradient scaler.

    1. Distort the batch and split it into `micro_batches` pieces.
    2. Embed each piece. Only the last one keeps what its backward pass needs.
    3. The loss of the embeddings of all pieces and ranks, and its gradient with respect to them.
    4. Backward through the last piece; then embed each of the others again and go backward through it.
       Gradients add up, and ranks exchange them once, in the last backward pass.
    5. The optimiser's step. Where the loss or a gradient is not finite, nothing changes: not the weights, not
       the momenta, not the running statistics; `skipped_in_row` (0-d float32 on the device) counts such steps
       up to the last one.
    With one piece this is plain training; with k pieces the forward pass costs (2k - 1) / k times as much,
    and the memory is that of one piece (Gao et al. 2021, "Scaling deep contrastive learning batch size under
    memory limited setup"). Without batch-norm the gradient is the one of the whole batch. Batch-norm
    normalises each piece by its own statistics, and running statistics advance once for each piece, in 2.
    Piece j of k holds each rank's rows j, j + k, j + 2k and so on: over all ranks the same samples, whatever
    the number of ranks.

    `network` is a `Twin`, or what wraps one, on the device in channels-last format. `mark` is called with the
    name of each of `PHASES` after the step has queued that phase's work, or with "step" alone where the step
    is replayed as a CUDA graph. From the end of a step to the next one, `z_a_ND` holds the embeddings of the
    first view, without gradient and in the order of the pieces, and with `keep_features` `features_NF` those
    of the backbone, in the order of the batch.

    Load the states of network and optimiser before the first step. Raises `ConfigError` where the settings do
    not fit the device or the number of ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        steps_per_epoch: int,
        mark: Callable[[str], None] = lambda phase: None,
        keep_features: bool = False,
    ) -> None:
        self.network = network
        self.features_NF: Tensor
        self.z_a_ND: Tensor
        self._device = next(network.parameters()).device
        _check(config, self._device)
        self.optimizer: Lars = build_optimizer(network, config.train.optim)
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=config.train.precision == "fp16")
        self.skipped_in_row = torch.zeros((), device=self._device)
        self._statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._config = config
        self._dtype = DTYPES[config.train.precision]
        self._steps_per_epoch = steps_per_epoch
        self._mark = mark
        # Each rank's loss has the gradient of the global loss with respect to its own samples. Data-parallel
        # training averages these over the ranks although their sum is the true gradient, hence world_size.
        # The authors' code lacks that factor, and their published run had 16 ranks: a
        # reference_world_size of 16 gives its gradient on any number of ranks.
        self._gradient_share = world_size() / config.model.loss.reference_world_size
        self._network_call = network
        if config.train.compile:
            torch.compiler.config.recompile_limit = COMPILED_VARIANTS
            self._network_call = torch.compile(network)
        self._network_options = {"with_features": True} if keep_features else {}
        self._graph: StepGraph | None = None
        if config.train.cuda_graph:
            self.optimizer.keep_rates_on_device()
            self._graph = StepGraph(self._train)

    def __call__(self, batch: Batch, step: int) -> BarlowLoss:
        """Train on one batch as global step `step` (from 0); the loss comes back detached, on the device."""
        self._set_learning_rates(step)
        if self._graph is None:
            terms = self._train(batch.views_VNHWC, batch.params)
        else:
            with phase_range("step", self._device):
                terms = self._graph(batch.views_VNHWC, batch.params)
            if self._graph.is_recorded:
                self._mark("step")
        return BarlowLoss(*terms.unbind())

    def _train(self, views_VNHWC: Tensor, params: ViewParams) -> Tensor:
        """The step without its learning rates; the terms of `BarlowLoss` in one tensor."""
        with self._phase("augment"):
            self.optimizer.zero_grad(set_to_none=True)
            views_VNCHW = distort(views_VNHWC, params, self._config.data.augment, self._dtype)
            *others, last = _pieces(views_VNCHW, self._config.train.micro_batches)  # 1
            del views_VNCHW
            statistics = _flat(self._statistics) if self._statistics else None

        with self._phase("forward"):
            with torch.no_grad():
                outputs = [self._embed(piece) for piece in others]  # 2
            with self._unexchanged_if(others):
                outputs.append(self._embed(last))
            embeddings, features = zip(*outputs, strict=True)
            if features[0]:
                self.features_NF = torch.stack([f_nF for (f_nF,) in features], dim=1).flatten(0, 1)

        with self._phase("loss"):
            z_a_ND, z_b_ND = (torch.cat(z).detach().requires_grad_() for z in zip(*embeddings, strict=True))
            loss = barlow_loss(z_a_ND, z_b_ND, self._config.model.loss)  # 3
            self.z_a_ND = z_a_ND.detach()

        with self._phase("backward"):
            self.scaler.scale(loss.total * self._gradient_share).backward()
            n = len(z_a_ND) // (len(others) + 1)
            *gradients, gradients_last = zip(z_a_ND.grad.split(n), z_b_ND.grad.split(n), strict=True)
            with self._unexchanged_if(others):
                torch.autograd.backward(embeddings[-1], gradients_last)  # 4
            with _unchanged_buffers(self.network) if others else nullcontext():
                while others:
                    piece, gradient = others.pop(), gradients.pop()
                    with self._unexchanged_if(others):
                        torch.autograd.backward(self._embed(piece)[0], gradient)

        with self._phase("optimizer"):
            if self.scaler.is_enabled():
                self.scaler.unscale_(self.optimizer)  # 5
            self.scaler.step(self.optimizer, loss.total.detach().isfinite().logical_not())
            self.scaler.update()
            skipped = self.optimizer.skipped
            if statistics is not None:
                _copy_flat(torch.where(skipped > 0, statistics, _flat(self._statistics)), self._statistics)
            self.skipped_in_row.add_(1).mul_(skipped)
        return torch.stack([term.detach() for term in loss])

    def _embed(self, views_VnCHW: Tensor) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        """Embeddings of both views, (n, D) each; with them the features to keep, (n, F), or none.

        Each call has an autocast of its own, since one remembers casts of weights, and those that were made
        without gradients would be taken where gradients are needed.
        """
        is_half = self._dtype.itemsize == 2
        with torch.autocast(self._device.type, self._dtype if is_half else None, enabled=is_half):
            z_a_nD, z_b_nD, *features = self._network_call(views_VnCHW, **self._network_options)
        return (z_a_nD, z_b_nD), features

    def _unexchanged_if(self, more: object) -> AbstractContextManager[None]:
        """Where `more` backward passes follow: forward and backward without the exchange between ranks."""
        if more and isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return nullcontext()

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        """What is queued inside is that phase of the step; while a graph is recorded, no phase has an end."""
        with phase_range(phase, self._device):
            yield
        if not (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._mark(phase)

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


def _pieces(views_VNCHW: Tensor, count: int) -> list[Tensor]:
    """Piece j of `count` has the rows j, j + count, j + 2 count and so on: (V, n, C, H, W) as channels-last.

    One piece is the batch itself, not a copy.
    """
    n = views_VNCHW.shape[1] // count
    views_VnkHWC = views_VNCHW.permute(0, 1, 3, 4, 2).unflatten(1, (n, count))
    pieces_kVnHWC = views_VnkHWC.movedim(2, 0).contiguous()
    return list(pieces_kVnHWC.permute(0, 1, 2, 5, 3, 4).unbind())


@contextmanager
def _unchanged_buffers(network: nn.Module) -> Iterator[None]:
    """After the block the running statistics of batch-norms, and any other buffers, are what they were."""
    buffers = list(network.buffers())
    held = [torch.empty_like(buffer) for buffer in buffers]
    _copy_together(buffers, held)
    yield
    _copy_together(held, buffers)


def _copy_together(sources: list[Tensor], targets: list[Tensor]) -> None:
    for dtype in {source.dtype for source in sources}:  # few launches for all tensors of one dtype
        chosen = [i for i, source in enumerate(sources) if source.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])


def _flat(tensors: list[Tensor]) -> Tensor:
    """All numbers of `tensors` in one row."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _copy_flat(numbers: Tensor, targets: list[Tensor]) -> None:
    """The inverse of `_flat`, into the memory of `targets`."""
    parts = numbers.split([target.numel() for target in targets])
    torch._foreach_copy_(targets, [part.view_as(t) for part, t in zip(parts, targets, strict=True)])


def _check(config: RunConfig, device: torch.device) -> None:
    train, ranks = config.train, world_size()
    if train.batch_size // ranks % train.micro_batches:
        raise ConfigError(
            f"train.micro_batches must divide the {train.batch_size // ranks} samples of each rank, but it "
            f"is {train.micro_batches}; change it, or train.batch_size."
        )
    if train.precision == "fp64" and device.type != "cpu":
        raise ConfigError(
            "train.precision fp64 is for the CPU, but this run is on a GPU; set train.device to cpu, or "
            "train.precision to fp32."
        )
    if train.cuda_graph and (device.type != "cuda" or ranks > 1):
        where = "this run is on the CPU" if device.type != "cuda" else f"this run has {ranks} ranks"
        raise ConfigError(f"train.cuda_graph needs one GPU, but {where}; set it to false.")
    size, shrinks = config.data.image_size, not config.model.small_stem
    if train.precision == "bf16" and device.type == "cpu" and shrinks and size <= WRONG_BF16_SIZE:
        raise ConfigError(
            f"In bf16 on the CPU oneDNN computes wrong gradients for views of {size} pixels, which the "
            f"network shrinks to single pixels too early; set model.small_stem to true, train.precision to "
            f"fp32, or data.image_size to more than {WRONG_BF16_SIZE}."
        )
    compiler = os.environ.get("CXX", "g++")
    if train.compile and shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile needs the C++ compiler {compiler}, which is not installed; install it, or set "
            f"train.compile to false."
        )
