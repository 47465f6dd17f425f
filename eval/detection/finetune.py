"""Fine-tuning of a detector, on one process or on many, that can be interrupted at any iteration."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from eval.detection.batches import training_batches
from eval.detection.config import DetectionConfig
from eval.detection.images import AnnotatedImages, Sample, Target
from eval.detection.network import batch_norms
from eval.detection.reports import Meter, OnReport, Pace
from model.collectives import is_first_rank, world_size
from model.errors import ModelError
from model.norm.layers import synchronise_norms


class Finetuning:
    """Detector, optimiser and scaler, and how far they have come.

    All ranks call all methods alike. Norms have their statistics over all ranks, gradients are means over
    them. On the CPU with one thread, and the same number of ranks, an interrupted run ends with the weights
    of an uninterrupted one, bit for bit.
    """

    def __init__(
        self,
        detector: GeneralizedRCNN,
        images: AnnotatedImages,
        config: DetectionConfig,
        device: torch.device,
    ) -> None:
        self.images, self.config, self.device = images, config, device
        self.detector = detector.to(device, memory_format=torch.channels_last)
        self.rank = dist.get_rank() if world_size() > 1 else 0
        self._over_ranks: nn.Module = self.detector
        if world_size() > 1:
            synchronise_norms(self.detector)
            device_ids = [device] if device.type == "cuda" else None
            self._over_ranks = DistributedDataParallel(
                self.detector, device_ids=device_ids, forward_sync_buffers=False
            )
        in_norms = [p for norm in batch_norms(self.detector) for p in norm.parameters()]
        others = [p for p in self.detector.parameters() if all(p is not other for other in in_norms)]
        groups = [
            {"params": others, "weight_decay": config.weight_decay},
            {"params": in_norms, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        is_fp16 = detector.backbone.half is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_fp16)
        self.done = 0  # iterations

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {
            "model": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.done,
            "num_samples": len(self.images),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; it must be of the same detector."""
        self.detector.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.done = state["step"]

    def run(
        self,
        save: Callable[[bool], None],
        is_due: Callable[[], bool],
        wants_to_stop: Callable[[], bool],
        on_report: OnReport | None = None,
    ) -> bool:
        """Train to the last iteration; returns whether it got there, or some rank wanted to stop before.

        1. the learning rate, and random numbers that depend on the iteration and the rank alone
        2. forward, backward, update  3. the ranks agree on how to go on  4. a report now and then
        5. a checkpoint now and then, and at the end

        Raises `ModelError` where the loss is not finite any more, with the last checkpoint intact.
        """
        config = self.config
        meter = Meter(config, self.done)
        self._over_ranks.train()
        with closing(self._batches(self.done, config.iterations)) as batches:
            while self.done < config.iterations:
                with meter.waiting():
                    samples = next(batches)
                lr = learning_rate(self.done, config)  # 1
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self._seed(self.done)
                losses = self._over_ranks(*on_device(samples, self.device))  # 2
                loss = torch.stack(list(losses.values())).sum()
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.done += 1
                is_broken, stops, saves = self._agree(  # 3
                    not loss.isfinite(), wants_to_stop(), is_first_rank() and is_due()
                )
                if is_broken:
                    raise ModelError(
                        f"The loss is not finite any more at iteration {self.done}; start anew with a "
                        f"lower --lr and another --out."
                    )
                is_last = stops or self.done == config.iterations
                if is_last or self.done % config.log_every == 0:  # 4
                    report = meter.report(self.done, _mean_over_ranks(losses), lr)
                    if on_report is not None and is_first_rank():
                        on_report(report)
                if is_last or saves:  # 5
                    save(is_last)
                if stops:
                    break
        return self.done == config.iterations

    @torch.no_grad()
    def measure_statistics(self, on_report: OnReport | None = None) -> None:
        """Set the running statistics of the norms to means over training batches, under the final weights.

        They lag behind weights that still move; MoCo's evaluation measures them anew, too (fvcore's
        "precise batch-norm").
        """
        norms = batch_norms(self.detector)
        momenta = [norm.momentum for norm in norms]
        count = self.config.statistics_iterations
        pace = Pace("measuring batch-norm", count, on_report)
        self.detector.train()
        with closing(self._batches(self.done, self.done + count)) as batches:
            for number, samples in enumerate(batches):
                for norm in norms:
                    norm.momentum = 1 / (number + 1)  # makes the running average the mean
                self._seed(self.done + number)
                self.detector(*on_device(samples, self.device))
                pace.step(number + 1)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def _batches(self, first: int, end: int) -> Iterator[list[Sample]]:
        return training_batches(self.images, self.config, range(first, end), self.rank, world_size())

    def _seed(self, iteration: int) -> None:
        """Sizes, anchors and regions are drawn by torch's global generators, inside torchvision."""
        words = np.random.SeedSequence((self.config.seed, iteration, self.rank))
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))

    def _agree(self, *wishes: bool | Tensor) -> list[bool]:
        """Of each wish whether any rank has it."""
        wishes_W = torch.tensor([float(wish) for wish in wishes], device=self.device)
        if world_size() > 1:
            dist.all_reduce(wishes_W, dist.ReduceOp.MAX)
        return [bool(wish) for wish in wishes_W.tolist()]


def learning_rate(iteration: int, config: DetectionConfig) -> float:
    """For an iteration counted from 0: a linear warm-up, times a tenth for each milestone that has passed."""
    lr = config.lr * 0.1 ** sum(iteration >= milestone for milestone in config.milestones)
    if iteration < config.warmup_iterations:
        progress = iteration / config.warmup_iterations
        lr *= config.warmup_factor * (1 - progress) + progress
    return lr


def on_device(samples: list[Sample], device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """Images in 0..1 and targets, as the detector takes them."""
    images = [image.to(device, non_blocking=True).float().div_(255) for image, _ in samples]
    targets = [
        {name: part.to(device, non_blocking=True) for name, part in target.items()} for _, target in samples
    ]
    return images, targets


def _mean_over_ranks(losses: dict[str, Tensor]) -> dict[str, float]:
    values_K = torch.stack(list(losses.values())).detach()
    if world_size() > 1:
        dist.all_reduce(values_K)
    values = (values_K / world_size()).tolist()
    return {name.removeprefix("loss_"): value for name, value in zip(losses, values, strict=True)}
