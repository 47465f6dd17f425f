"""Linear classification on features computed beforehand, for many learning rates and weight decays at once.

The training is that of `eval.linear`, except that an image has as many crops as there were passes instead of
a new one in each epoch, and that the rate is chosen on training images held out for it. All settings see the
same batches, so one matrix product serves them all.

Shape legend: N samples of a dataset, n of them on this rank, b of a batch on this rank, F feature width,
E = F + 1 (the bias is a weight of a feature that is always 1), S settings, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from eval.classifier import MOMENTUM, cosine, new_classifier
from eval.config import LinearFastConfig
from eval.crops import RandomCrops
from eval.features import FeatureShare
from eval.progress import Progress, shifted
from eval.scores import right_answers
from eval.task import EvalTask
from model.collectives import sum_over_ranks, sum_over_ranks_
from model.errors import ModelError
from pipelines.errors import DataError
from pipelines.order import epoch_permutation

_HELD_OUT = 0xFFFFFFFF  # an epoch whose order no training uses
_LOGITS = 2**26  # in memory at once, 256 MiB of float32


class Setting(NamedTuple):
    """What one of the classifiers is trained with."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class LinearFastResult:
    """Shares (0 to 1) of right answers on the test set, and how the setting was chosen."""

    top1: float
    top5: float
    chosen: Setting
    held_out_top1: dict[Setting, float]  # of each setting, 0 where it diverged; empty where there is but one


def linear_fast(task: EvalTask) -> LinearFastResult:
    """Extract the features of each pass over the training images and of the test set; `choose_and_train`."""
    config, images = task.config.linear_fast, len(task.train)
    count = max(1, config.passes)
    total = count * images + len(task.test)
    passes = []
    for number in range(count):
        crops = RandomCrops(task.train, task.config.features, config.seed, number) if config.passes else None
        passes.append(task.share(task.train, f"train-{number}", number * images, total, images=crops))
    test = task.share(task.test, "test", count * images, total)
    return choose_and_train(passes, test, task.num_classes, config, task.device, task.progress)


def choose_and_train(
    passes: Sequence[FeatureShare],
    test: FeatureShare,
    num_classes: int,
    config: LinearFastConfig,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> LinearFastResult:
    """Choose learning rate and weight decay, then train a classifier with them and test it.

    1. hold out a share of the training images, by the seed
    2. train a classifier with each setting on the others; epoch e learns from pass e modulo their number
    3. choose the setting that classifies most of those held out; of equal ones the one with the smaller rate
    4. train with it on all training images, and test

    `passes` hold the features of the same images in other crops. `progress` counts images learnt from. Raises
    `DataError` where there are too few images to hold any out, `ModelError` where every setting diverges.
    """
    device, images = torch.device(device), passes[0].total
    settings = sorted(Setting(*pair) for pair in product(set(config.lr), set(config.weight_decay)))
    job = BatchedTraining(passes, num_classes, config, device)
    chosen, scores, before = settings[0], {}, 0
    if len(settings) > 1:
        order_N = epoch_permutation(images, config.seed, _HELD_OUT)  # 1
        count = round(config.held_out * images)
        if not 0 < count < images:
            raise DataError(
                f"Of {images} training images a held-out share of {config.held_out:g} leaves none to choose "
                f"the learning rate by, or none to learn from; change eval.linear_fast.held_out or give one "
                f"learning rate and one weight decay."
            )
        before = config.epochs * (images - count)
        report = shifted(progress, 0, before + config.epochs * images)
        weights_SCE = job.train(settings, np.sort(order_N[count:]), report)  # 2
        right_S = job.right(weights_SCE, passes[0], order_N[:count])[:, 0]
        scores = dict(zip(settings, (right_S.double() / count).tolist(), strict=True))
        chosen = max(settings, key=scores.__getitem__)  # 3
    report = shifted(progress, before, before + config.epochs * images)
    weights_1CE = job.train([chosen], np.arange(images), report)  # 4
    if not weights_1CE.isfinite().all():
        raise ModelError(
            f"The classifier diverges with a learning rate of {chosen.lr:g}; give smaller ones in "
            f"eval.linear_fast.lr."
        )
    top1, top5 = (job.right(weights_1CE, test)[0].double() / test.total).tolist()
    return LinearFastResult(top1, top5, chosen, scores)


class BatchedTraining:
    """Trains one classifier for each of several settings, all at once; the samples are those of `passes`."""

    def __init__(
        self,
        passes: Sequence[FeatureShare],
        num_classes: int,
        config: LinearFastConfig,
        device: torch.device,
    ) -> None:
        self._passes, self._config, self._device = passes, config, device
        self._num_classes = num_classes
        n, width = passes[0].features_nF.shape
        self._inputs_nE = torch.ones(n, width + 1, device=device)
        self._holds: FeatureShare | None = None  # whose features are in the inputs

    def train(self, settings: Sequence[Setting], indices_K: np.ndarray, progress: Progress) -> Tensor:
        """Weights (S, C, E) after learning from the samples `indices_K` of all ranks."""
        config, share = self._config, self._passes[0]
        S, C, E = len(settings), self._num_classes, self._inputs_nE.shape[1]
        drawn = new_classifier(E - 1, C, config.seed)
        drawn_CE = torch.cat([drawn.weight.detach(), drawn.bias.detach()[:, None]], dim=1)
        weights_SCE = drawn_CE.to(self._device).repeat(S, 1, 1)
        velocity_SCE = torch.zeros_like(weights_SCE)
        lr_S11, decay_S11 = torch.tensor(settings, device=self._device).T[:, :, None, None]
        labels_n = share.labels_n.to(self._device)
        for epoch in range(config.epochs):
            self._take(self._passes[epoch % len(self._passes)])
            rate_S11 = lr_S11 * cosine(epoch, config.epochs)
            order_K = indices_K[epoch_permutation(len(indices_K), config.seed, epoch)]
            for start in range(0, len(order_K), config.batch_size):
                batch_N = order_K[start : start + config.batch_size]
                rows_b = torch.from_numpy(_own(share, batch_N)).to(self._device, non_blocking=True)
                inputs_bE = self._inputs_nE[rows_b]
                errors_bSC = (inputs_bE @ weights_SCE.view(S * C, E).T).view(-1, S, C).softmax(dim=2)
                errors_bSC -= one_hot(labels_n[rows_b], C)[:, None]
                gradient_SCE = (errors_bSC.view(-1, S * C).T @ inputs_bE).view(S, C, E).div_(len(batch_N))
                sum_over_ranks_(gradient_SCE)
                velocity_SCE.mul_(MOMENTUM).add_(gradient_SCE).add_(decay_S11 * weights_SCE)
                weights_SCE.sub_(rate_S11 * velocity_SCE)
            progress((epoch + 1) * len(indices_K), config.epochs * len(indices_K))
        return weights_SCE

    def right(self, weights_SCE: Tensor, share: FeatureShare, indices_K: np.ndarray | None = None) -> Tensor:
        """int64 (S, 2): right answers of all ranks, top-1 and top-5, on the samples `indices_K`, or on all.

        Where a setting has diverged, its answers are wrong.
        """
        S, C, E = weights_SCE.shape
        rows = np.arange(len(share.labels_n)) if indices_K is None else _own(share, indices_K)
        right_S2 = torch.zeros(S, 2, dtype=torch.int64, device=self._device)
        for rows_b in torch.from_numpy(rows).split(max(1, _LOGITS // (S * C))):
            inputs_bE = pad(share.features_nF[rows_b].to(self._device), (0, 1), value=1.0)
            logits_bSC = (inputs_bE @ weights_SCE.view(S * C, E).T).view(-1, S, C)
            labels_b = share.labels_n[rows_b].to(self._device)
            for setting in range(S):
                if logits_bSC[:, setting].isfinite().all():
                    right_S2[setting] += right_answers(logits_bSC[:, setting], labels_b)
        return sum_over_ranks(right_S2)

    def _take(self, share: FeatureShare) -> None:
        if self._holds is not share:
            self._inputs_nE[:, :-1] = share.features_nF.to(self._device)
            self._holds = share


def _own(share: FeatureShare, indices_K: np.ndarray) -> np.ndarray:
    """Rows of the share that hold those of the samples which this rank has."""
    rows_K = indices_K - share.start
    return rows_K[(rows_K >= 0) & (rows_K < len(share.labels_n))]
