"""A linear classifier that learns beside the network, to show during training what the features are worth.

Shape legend: N samples of this rank, F feature width, E = F + 1, C classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad

from model.collectives import sum_over_ranks_, world_size


class OnlineProbe:
    """Learns from the features of each step, after the answers to them have been counted.

    1. Each sample's features are brought to mean 0 and length 1, and a constant 1 for the bias follows them.
    2. The answer is the class with the largest product with its weights; it is counted as right or wrong.
    3. The gradient of the mean cross-entropy over all ranks' samples.
    4. A step of plain gradient descent; none where the features are not finite.
    Ranks add up gradients and counts in one collective, so all of them hold the same weights, which are those
    of a single rank but for the order of summation. The weights begin at zero: no random number is drawn. The
    host waits for nothing.

    Features and labels must be on `device`. `weight_CE` is float32; `right` (0-d float32) counts the right
    answers of all ranks since it was last set to zero.
    """

    def __init__(self, feature_dim: int, num_classes: int, lr: float, device: torch.device) -> None:
        self.weight_CE = torch.zeros(num_classes, feature_dim + 1, device=device)
        self.right = torch.zeros((), device=device)
        self._lr = lr
        self._classes_C = torch.arange(num_classes, device=device)
        # The gradient and the number of right answers, for the collective.
        self._sums = torch.zeros(self.weight_CE.numel() + 1, device=device)

    @torch.no_grad()
    def learn(self, features_NF: Tensor, labels_N: Tensor) -> None:
        """Take the features (N, F) of any floating dtype and the labels (N,), int64, of one step."""
        N, F = features_NF.shape
        C, E = self.weight_CE.shape
        unit_NF = layer_norm(features_NF.float(), (F,)) / F**0.5  # 1
        inputs_NE = pad(unit_NF, (0, 1), value=1.0)
        logits_NC = inputs_NE @ self.weight_CE.T
        torch.sum(logits_NC.argmax(dim=1) == labels_N, dim=0, dtype=torch.float32, out=self._sums[-1])  # 2
        errors_NC = logits_NC.softmax(dim=1) - (labels_N[:, None] == self._classes_C).float()
        torch.mm(errors_NC.T, inputs_NE, out=self._sums[:-1].view(C, E))  # 3
        sum_over_ranks_(self._sums)
        self._sums.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self.weight_CE.add_(self._sums[:-1].view(C, E), alpha=-self._lr / (N * world_size()))  # 4
        self.right += self._sums[-1]

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.weight_CE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`, if it is of as many classes and features; else the probe stays as it is."""
        if state["weight"].shape == self.weight_CE.shape:
            self.weight_CE.copy_(state["weight"])
