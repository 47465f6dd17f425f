"""Fine-tuning on few labels (paper section 3.2): the authors' evaluate.py with `--weights finetune`.

Their README gives the settings for 1 %; for 10 % they took the same.
"""

from eval.classifier import Recipe, train_classifier
from eval.task import EvalTask


def semisup(task: EvalTask) -> dict[str, float]:
    """Figures of backbone and classifier trained on the task's subset of images; see `train_classifier`."""
    config = task.config.semisup
    recipe = Recipe(
        config.epochs,
        config.batch_size,
        config.lr_classifier,
        config.lr_backbone,
        config.weight_decay,
        config.seed,
    )
    return train_classifier(task, recipe)
