"""Linear classification of other data sets on frozen features (paper, section 3.3 and appendix C.1).

The paper: SGD with momentum 0.9 for 14 epochs on Places-205, 84 on iNaturalist 2018, a rate of 0.01 divided
by ten "at two equally spaced intervals", weight decay 5e-4, "the exact settings from PIRL". What these leave
open is taken from VISSL, the code of PIRL's authors (configs/config/benchmark/linear_image_classification):
batches of 256, Nesterov's momentum, a batch-norm before the linear layer, without weight decay. VISSL itself
divides the rate three times, after epochs 4, 8 and 12 or 24, 48 and 72: `milestones`.
"""

from pathlib import Path

from eval.classifier import Recipe, train_classifier
from eval.config import TransferConfig
from eval.task import EvalTask
from pipelines.source.layouts import LAYOUTS

EPOCHS = {"places205": 14, "inat18": 84, "folder": 28}  # the paper's, and for other data VISSL's for ImageNet


def parts_of(name: str, root: Path) -> tuple[Path, Path]:
    """What to train and to test on: a data set of `LAYOUTS`, or the folders train and val of class folders.

    Both are for `open_source`.
    """
    if name in LAYOUTS:
        train, test = (Path(f"{name}:{root}:{part}") for part in LAYOUTS[name].parts)
        return train, test
    return root / "train", root / "val"


def for_data_set(name: str, config: TransferConfig) -> TransferConfig:
    """What is left open in `config` filled in for the data set `name`, a key of `EPOCHS`."""
    epochs = config.epochs or EPOCHS[name]
    thirds = tuple(round(epochs * third / 3) for third in (1, 2))
    return config.model_copy(
        update={
            "epochs": epochs,
            "milestones": thirds if config.milestones is None else config.milestones,
        }
    )


def transfer(task: EvalTask, config: TransferConfig) -> dict[str, float]:
    """Figures of a linear classifier that learns from random crops; see `train_classifier`.

    Nothing of `config` may be left open.
    """
    assert config.epochs is not None
    recipe = Recipe(
        config.epochs,
        config.batch_size,
        config.lr,
        None,
        config.weight_decay,
        config.seed,
        milestones=config.milestones,
        nesterov=True,
        normalise=config.normalise,
    )
    return train_classifier(task, recipe)
