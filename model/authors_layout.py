"""Checkpoints of the authors' code (facebookresearch/barlowtwins, main.py), and names of tensors in general.

Their `checkpoint.pth` is a dict:

- `epoch`: whole epochs done, from which their code goes on
- `model`: the network inside `DistributedDataParallel`, so that each name begins with `module.`: then
  `backbone.*` and `projector.*`, which are our names too, and `bn.*`, a batch-norm of the embeddings
- `optimizer`: of their LARS; the momentum `mu` of each parameter, weights first, as in ours

`bn` has no weight and no bias. Its running statistics are of no use: the loss takes those of each batch, and
nothing in their code reads the others. Our loss keeps none, but their strict loading needs them, so they are
written as those of a new batch-norm, mean 0 and variance 1 after no batches; when read they are left out.

Their `resnet50.pth` is the backbone's state dict in torchvision's layout.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.tensor_files import is_plain

WRAPPER, BACKBONE, PROJECTOR, EMBEDDING_NORM = "module.", "backbone.", "projector.", "bn."


def network_state(content: Any) -> dict[str, Tensor] | None:
    """The tensors in a file's content under the names of `model.twin.Twin`; None where it has no network.

    Takes a checkpoint, ours or theirs, the state dict of a twin, or that of a ResNet, whose names get
    `backbone.` in front. The authors' `bn`, and of a ResNet the classifier, are left out.
    """
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        return None
    if not all(isinstance(name, str) and is_plain(value) for name, value in state.items()):
        return None
    state = {name.removeprefix(WRAPPER): value for name, value in state.items()}
    if any(name.startswith(BACKBONE) for name in state):
        return {name: value for name, value in state.items() if not name.startswith(EMBEDDING_NORM)}
    if "conv1.weight" not in state:
        return None
    return {BACKBONE + name: value for name, value in state.items() if not name.startswith("fc.")}


def authors_checkpoint(
    state: Mapping[str, Tensor],
    epoch: int,
    momenta: Mapping[int, Tensor],
    group_sizes: Sequence[int],
    options: Mapping[str, float],
) -> dict[str, Any]:
    """The `checkpoint.pth` of a twin's `state`, for `torch.save`.

    `momenta` are by the number of their parameter, where all weights count before all biases and batch-norm
    parameters, and `group_sizes` says how many there are of each. `options` are lr, weight_decay, momentum
    and eta; before its first step their code sets the rates anew.
    """
    *_, last = (value for name, value in state.items() if name.startswith(PROJECTOR))
    norm = {
        "running_mean": torch.zeros(len(last)),
        "running_var": torch.ones(len(last)),
        "num_batches_tracked": torch.tensor(0),
    }
    network = {**state, **{EMBEDDING_NORM + name: value for name, value in norm.items()}}
    groups, start = [], 0
    for size in group_sizes:
        filters = {"weight_decay_filter": True, "lars_adaptation_filter": True}
        groups.append({**options, **filters, "params": list(range(start, start + size))})
        start += size
    return {
        "epoch": epoch,
        "model": {WRAPPER + name: value.contiguous() for name, value in network.items()},
        "optimizer": {
            "state": {number: {"mu": mu.contiguous()} for number, mu in momenta.items()},
            "param_groups": groups,
        },
    }
