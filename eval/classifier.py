"""A classifier trained on a backbone that is frozen or learns along, as in the authors' evaluate.py.

SGD with momentum, a rate per epoch, random crops, a linear layer drawn from N(0, 0.01) with zero bias; the
test set is classified after each epoch. On several ranks each takes its part of every global batch, and the
gradient is the mean over that batch, as with DistributedDataParallel and equal parts.

Shape legend: K training samples, N of a global batch, n of them on this rank, M test samples, C classes,
F feature width, S side of a crop in pixels.
"""

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eval.crops import RandomCrops, loading
from eval.features import FeatureShare, feature_width, features_of_crops, normalised
from eval.scores import right_answers, shares
from eval.task import EvalTask
from model.collectives import column_range as share_range
from model.collectives import is_first_rank, object_from_first_rank, sum_over_ranks_, world_size
from model.norm import synchronise_norms
from pipelines.errors import DataError
from pipelines.order import epoch_permutation

MOMENTUM = 0.9
INITIAL_STD = 0.01
DROP = 0.1  # of the rates, at each milestone
KEPT = "training"  # name of the state


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained; rates are for the global batch and are not scaled with it."""

    epochs: int
    batch_size: int  # global
    lr_classifier: float
    lr_backbone: float | None  # None: it stays as it is, in evaluation mode
    weight_decay: float
    seed: int
    milestones: tuple[int, ...] | None = None  # epochs after which rates are a tenth; None: a cosine
    nesterov: bool = False
    normalise: bool = False  # a batch-norm before the linear layer, without weight decay

    def share_of_rate(self, epoch: int) -> float:
        """Of the base rates, in this epoch, counted from 0."""
        if self.milestones is None:
            return cosine(epoch, self.epochs)
        return DROP ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass
class Place:
    """How far the training has come, and what the test after each epoch has found."""

    epoch: int = 0
    step: int = 0  # steps done in this epoch
    history: list[list[float]] = field(default_factory=list)  # top1, top5 by epoch


def cosine(epoch: int, epochs: int) -> float:
    """Share of the base rate in this epoch, counted from 0, of that many."""
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


def new_classifier(width: int, num_classes: int, seed: int) -> nn.Linear:
    """(N, F) to (N, C), on the CPU, drawn as the authors do; leaves other random numbers alone."""
    classifier = nn.utils.skip_init(nn.Linear, width, num_classes)
    random = torch.Generator().manual_seed(seed)
    nn.init.normal_(classifier.weight, std=INITIAL_STD, generator=random)
    nn.init.zeros_(classifier.bias)
    return classifier


def train_classifier(task: EvalTask, recipe: Recipe) -> dict[str, float]:
    """Shares (0 to 1) of right answers on the test set: `top1` and `top5` after the last epoch, and the best
    of all epochs, which is what the authors report, but was chosen on the test set.

    1. network and optimizer; the test set's features, where the backbone is frozen
    2. go on from the state that is kept, if there is one
    3. each epoch: a step on each global batch of random crops, the last, smaller one too; then the test

    A backbone that learns is in training mode and float32. Its batch-norm has the statistics of the global
    batch on any number of ranks, as the authors' has on one GPU; `task.backbone` itself stays as it is.

    Raises `DataError` where an image cannot be read or batches are too small for batch-norm, `ModelError`
    where the classifier diverges.
    """
    return _Training(task, recipe).run()


class _Training:
    def __init__(self, task: EvalTask, recipe: Recipe) -> None:
        self._task, self._recipe, self._config = task, recipe, task.config.features
        self._learns = recipe.lr_backbone is not None
        self._indices_K = np.arange(len(task.train)) if task.subset_K is None else task.subset_K
        self._groups_G = task.train.group_sizes_G if task.subset_K is None else None
        # Images of an epoch, and of the whole evaluation.
        self._images = len(self._indices_K) + (len(task.test) if self._learns else 0)
        self._before = 0 if self._learns else len(task.test)
        self._total = self._before + recipe.epochs * self._images

        backbone = copy.deepcopy(task.backbone) if self._learns else task.backbone
        backbone.to(task.device, memory_format=torch.channels_last)
        synchronised = self._learns and world_size() > 1
        self._backbone = (synchronise_norms(backbone) if synchronised else backbone).eval()
        width = feature_width(self._backbone, self._config, task.device, task.normalisation)
        linear = new_classifier(width, task.num_classes, recipe.seed)
        norms = [nn.BatchNorm1d(width)] if recipe.normalise else []
        self._classifier = nn.Sequential(*norms, linear).to(task.device)
        if world_size() > 1:
            synchronise_norms(self._classifier)
        # Batch-norm has no statistics of a single value, and a rank without samples none to give.
        self._least = max(2, world_size()) if self._learns or recipe.normalise else 1
        size = min(recipe.batch_size, len(self._indices_K))
        if size < self._least:
            raise DataError(
                f"A batch of {size} images is too small for batch-norm on {world_size()} processes, which "
                f"takes {self._least} at least; learn from more images, or start fewer."
            )
        groups = [
            {"params": list(linear.parameters()), "lr": recipe.lr_classifier},
            {
                "params": list(self._classifier[:-1].parameters()),
                "lr": recipe.lr_classifier,
                "weight_decay": 0.0,
            },
        ]
        if self._learns:
            groups.append({"params": list(self._backbone.parameters()), "lr": recipe.lr_backbone})
        groups = [group for group in groups if group["params"]]
        self._rates = [group["lr"] for group in groups]
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = torch.optim.SGD(
            groups, momentum=MOMENTUM, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
        )
        self._place = Place()

    def run(self) -> dict[str, float]:
        task = self._task
        frozen_test = None if self._learns else task.share(task.test, "test", 0, self._total)  # 1
        self._resume()  # 2
        while self._place.epoch < self._recipe.epochs:  # 3
            self._train_epoch()
            scores = self._test(frozen_test)
            self._place = Place(self._place.epoch + 1, 0, [*self._place.history, list(scores)])
        top1_E, top5_E = zip(*self._place.history, strict=True)
        return {"top1": top1_E[-1], "top5": top5_E[-1], "best_top1": max(top1_E), "best_top5": max(top5_E)}

    def _train_epoch(self) -> None:
        task, place = self._task, self._place
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._recipe.share_of_rate(place.epoch)
        batches = self._batches(place.epoch)[place.step :]
        mine = [batch_N[share_range(len(batch_N))] for batch_N in batches]
        crops = RandomCrops(task.train, self._config, self._recipe.seed, place.epoch)
        self._backbone.train(self._learns)
        self._classifier.train()
        with loading(
            crops, [part.tolist() for part in mine if len(part)], self._config, task.device
        ) as found:
            for batch_N, part_n in zip(batches, mine, strict=True):
                self._step(next(found) if len(part_n) else None, task.train.labels(part_n), len(batch_N))
                place.step += 1
                if is_first_rank() and task.keeper.is_due:
                    task.keeper.save(KEPT, self._state())
                done = min(place.step * self._recipe.batch_size, len(self._indices_K))
                task.progress(self._begun + done, self._total)

    def _step(self, crops_nCSS: Tensor | None, labels_n: np.ndarray, batch_size: int) -> None:
        """One step on this rank's part of a global batch; None where it has none of it."""
        task = self._task
        self._optimizer.zero_grad()
        if crops_nCSS is not None:
            logits_nC = self._classifier(self._features(crops_nCSS))
            targets_n = torch.from_numpy(labels_n).to(task.device, non_blocking=True)
            (cross_entropy(logits_nC, targets_n, reduction="sum") / batch_size).backward()
        if world_size() > 1:
            self._sum_gradients()
        self._optimizer.step()

    def _sum_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters]
        total = sum_over_ranks_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))

    def _features(self, crops_NCSS: Tensor) -> Tensor:
        """(N, F), for a step."""
        task = self._task
        if self._learns:
            return self._backbone(normalised(crops_NCSS, task.device, task.normalisation))
        frozen_NF = features_of_crops(self._backbone, crops_NCSS, task.device, task.normalisation)
        return frozen_NF.float().clone()  # autograd keeps no tensor of the inference mode

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """The epoch's global batches."""
        size, seed = self._recipe.batch_size, self._recipe.seed
        order_K = self._indices_K[epoch_permutation(len(self._indices_K), seed, epoch, self._groups_G)]
        batches = np.split(order_K, range(size, len(order_K), size))
        if len(batches[-1]) < self._least:
            batches.pop()
        return batches

    @torch.no_grad()
    def _test(self, frozen_test: FeatureShare | None) -> tuple[float, float]:
        """Top-1 and top-5 shares, on all ranks together."""
        task = self._task
        share = frozen_test
        if share is None:
            before = self._begun + len(self._indices_K)
            share = task.share(task.test, None, before, self._total, backbone=self._backbone)
        self._classifier.eval()
        right_2 = torch.zeros(2, dtype=torch.int64, device=task.device)
        size = self._config.batch_size
        for features_nF, labels_n in zip(
            share.features_nF.split(size), share.labels_n.split(size), strict=True
        ):
            right_2 += right_answers(self._classifier(features_nF.to(task.device)), labels_n.to(task.device))
        return shares(right_2, share.total)

    @property
    def _begun(self) -> int:
        """Images done before this epoch."""
        return self._before + self._place.epoch * self._images

    def _state(self) -> dict[str, Any]:
        return {
            "place": asdict(self._place),
            "classifier": self._classifier.state_dict(),
            "backbone": self._backbone.state_dict() if self._learns else {},
            "optimizer": self._optimizer.state_dict(),
        }

    def _resume(self) -> None:
        state = object_from_first_rank(self._task.keeper.load(KEPT) if is_first_rank() else None)
        if state is None:
            return
        self._place = Place(**state["place"])
        self._classifier.load_state_dict(state["classifier"])
        if self._learns:
            self._backbone.load_state_dict(state["backbone"])
        self._optimizer.load_state_dict(state["optimizer"])
