"""Linear classification of other data sets on frozen features (paper, section 3.3 and appendix C.1).

The paper: SGD with momentum 0.9 for 14 epochs on Places-205, 84 on iNaturalist 2018, a rate of 0.01 divided
by ten "at two equally spaced intervals", weight decay 5e-4, "the exact settings from PIRL". What these leave
open is taken from VISSL, the code of PIRL's authors (configs/config/benchmark/linear_image_classification):
batches of 256, Nesterov's momentum, a batch-norm before the linear layer, without weight decay. VISSL itself
divides the rate three times, after epochs 4, 8 and 12 or 24, 48 and 72: `milestones`.

Shape legend: M test samples, N training samples, F feature width, C classes.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eval.config import FeaturesConfig
from eval.features import Progress, extract_features
from eval.result import EvalResult, summary
from eval.run import check_labels
from model.config import Section
from model.weights import IMAGENET, Normalisation
from pipelines.source import Source, open_source
from pipelines.source.layouts import LAYOUTS

MOMENTUM = 0.9
DROP = 0.1  # of the rate, at each milestone
INITIAL_STD = 0.01
FOLDER = "folder"


class TransferConfig(Section):
    """How the classifier is trained."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)] = 256
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    milestones: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="Epochs after which the rate is divided by ten; not set: at a third and two thirds."
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    normalise: bool = Field(True, description="Batch-norm before the linear layer.")
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0

    def rate(self, epoch: int) -> float:
        """Of this epoch, counted from 0."""
        milestones = self.milestones
        if milestones is None:
            milestones = tuple(round(self.epochs * third / 3) for third in (1, 2))
        return self.lr * DROP ** sum(epoch >= milestone for milestone in milestones)


# By data set; the paper's, and for other folders VISSL's for ImageNet.
SETTINGS = {
    "places205": TransferConfig(epochs=14),
    "inat18": TransferConfig(epochs=84),
    FOLDER: TransferConfig(epochs=28),
}


def open_parts(name: str, root: Path) -> tuple[Source, Source]:
    """What to train and to test on: a data set of `LAYOUTS`, or the folders train and val of class folders.

    Raises `DataError`.
    """
    if name in LAYOUTS:
        return open_source(Path(f"{name}:{root}:train")), open_source(Path(f"{name}:{root}:val"))
    return open_source(root / "train"), open_source(root / "val")


def transfer(
    name: str,
    backbone: nn.Module,
    root: Path,
    features: FeaturesConfig,
    config: TransferConfig,
    device: torch.device | str,
    progress: Progress | None = None,
    *,
    normalisation: Normalisation = IMAGENET,
) -> EvalResult:
    """Train on the training images of the data set `name`, a key of `SETTINGS`; test on those for validation.

    Features are of centre crops, computed once: there is no augmentation. `progress` counts the images of
    both parts. Raises `DataError` for what the layout refuses and where the parts' classes differ.
    """
    parts = open_parts(name, root)
    check_labels(*parts)
    tell, total = progress or (lambda done, total: None), sum(map(len, parts))
    tensors: list[Tensor] = []
    for source, before in zip(parts, (0, len(parts[0])), strict=True):
        tensors += extract_features(
            backbone,
            source,
            features,
            device,
            lambda done, _, before=before: tell(before + done, total),
            normalisation=normalisation,
        )
    figures = fit_and_test(*tensors, len(parts[0].classes), config, torch.device(device))
    settings: dict[str, Any] = {
        "features": features.model_dump(mode="json"),
        "transfer": {**config.model_dump(mode="json"), "augmentation": "none"},
    }
    data = {role: summary(source) for role, source in zip(("train", "test"), parts, strict=True)}
    return EvalResult(f"transfer-{name}", settings, data, figures)


def fit_and_test(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_MF: Tensor,
    test_labels_M: Tensor,
    num_classes: int,
    config: TransferConfig,
    device: torch.device,
) -> dict[str, float]:
    """Shares (0 to 1) of right answers after the last epoch, by the first guess and among five.

    `config.seed` fixes start and order. A last batch of a single sample, which has no statistics, is
    left out.
    """
    random = torch.Generator().manual_seed(config.seed)
    linear = nn.utils.skip_init(nn.Linear, train_NF.shape[1], num_classes)
    nn.init.normal_(linear.weight, std=INITIAL_STD, generator=random)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(train_NF.shape[1]) if config.normalise else nn.Identity()
    classifier = nn.Sequential(norm, linear).to(device)
    groups = [
        {"params": list(linear.parameters()), "weight_decay": config.weight_decay},
        {"params": list(norm.parameters()), "weight_decay": 0},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]], lr=config.lr, momentum=MOMENTUM, nesterov=True
    )
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(epoch)
        for rows in torch.randperm(len(train_NF), generator=random).split(config.batch_size):
            if len(rows) > 1:
                logits_NC = classifier(train_NF[rows].to(device))
                loss = cross_entropy(logits_NC, train_labels_N[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    classifier.eval()
    right_2 = torch.zeros(2, dtype=torch.int64)
    with torch.inference_mode():
        for features_MF, labels_M in zip(
            test_MF.split(config.batch_size), test_labels_M.split(config.batch_size), strict=True
        ):
            best_Mk = classifier(features_MF.to(device)).topk(min(5, num_classes)).indices.cpu()
            right_Mk = best_Mk == labels_M[:, None]
            right_2 += torch.stack([right_Mk[:, 0].sum(), right_Mk.any(dim=1).sum()])
    top1, top5 = (right_2.double() / len(test_MF)).tolist()
    return {"top1": top1, "top5": top5}
