"""Linear classification on frozen features, as the authors do it (paper section 3.1, their evaluate.py)."""

from eval.classifier import Recipe, train_classifier
from eval.task import EvalTask


def linear(task: EvalTask) -> dict[str, float]:
    """Figures of a linear classifier that learns from random crops; see `train_classifier`."""
    config = task.config.linear
    recipe = Recipe(config.epochs, config.batch_size, config.lr, None, config.weight_decay, config.seed)
    return train_classifier(task, recipe)
