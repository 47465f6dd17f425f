"""Linear probe: a linear classifier trained on frozen features.

The recipe is that of the authors' evaluate.py (SGD, cosine per epoch, no augmentation here since each image's
features are computed once). The figures are those of the last epoch, not of the best on the test set.

Shape legend: M test samples, N training samples, F feature width, C classes, k = min(5, C).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eval.config import LinearConfig

MOMENTUM = 0.9
INITIAL_STD = 0.01


@dataclass(frozen=True)
class LinearResult:
    """Shares (0 to 1) of the test samples whose class is the first, or among the first five."""

    top1: float
    top5: float


def linear_probe(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_MF: Tensor,
    test_labels_M: Tensor,
    config: LinearConfig,
    device: torch.device | str = "cpu",
) -> LinearResult:
    """Train the classifier on the training features and test it; `config.seed` fixes start and order.

    Features are float32, labels int64. With fewer than five classes, `top5` is the share within all of them.
    """
    num_classes = int(torch.cat([train_labels_N, test_labels_M]).max()) + 1
    random = torch.Generator().manual_seed(config.seed)
    classifier = nn.utils.skip_init(nn.Linear, train_NF.shape[1], num_classes)
    nn.init.normal_(classifier.weight, std=INITIAL_STD, generator=random)
    nn.init.zeros_(classifier.bias)
    classifier.to(device)
    train_NF, train_labels_N = train_NF.to(device), train_labels_N.to(device)

    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    for _ in range(config.epochs):
        order_N = torch.randperm(len(train_NF), generator=random).to(device)
        for rows in order_N.split(config.batch_size):
            loss = cross_entropy(classifier(train_NF[rows]), train_labels_N[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

    with torch.inference_mode():
        logits_MC = classifier(test_MF.to(device)).cpu()
    best_Mk = logits_MC.topk(min(5, num_classes)).indices
    right_Mk = best_Mk == test_labels_M[:, None]
    return LinearResult(
        top1=right_Mk[:, 0].double().mean().item(), top5=right_Mk.any(dim=1).double().mean().item()
    )
