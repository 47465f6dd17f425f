"""Settings of the evaluations of a backbone."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from model.config import Section

Seed = Annotated[int, Field(ge=0, lt=2**64)]
Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
Costs = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)]
Penalties = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]


class FeaturesConfig(Section):
    """How images become features: resize the short side, crop the centre, run the frozen backbone."""

    image_size: Annotated[int, Field(ge=8, le=512)] = 224
    resize: Annotated[int, Field(ge=8, le=1024)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 256
    workers: Annotated[int, Field(ge=0, le=256)] = 8

    @model_validator(mode="after")
    def _crop_fits_the_image(self) -> "FeaturesConfig":
        if self.resize < self.image_size:
            raise ValueError(
                f"resize must be at least image_size, but they are {self.resize} and {self.image_size}"
            )
        return self


class KnnConfig(Section):
    """Weighted k-nearest-neighbour classifier (Wu et al. 2018, section 3.4)."""

    k: Annotated[int, Field(ge=1)] = 200
    also_k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Other numbers of neighbours that are tried along the way."
    )
    temperature: Annotated[float, Field(gt=0)] = 0.07


class LinearConfig(Section):
    """Linear classifier on the frozen backbone: the settings of the authors' evaluate.py and README."""

    epochs: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 256
    lr: Annotated[float, Field(gt=0)] = 0.3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    seed: Seed = 0


class LinearFastConfig(Section):
    """The same classifier on features computed beforehand, for many rates at once."""

    passes: Annotated[int, Field(ge=0, le=100)] = Field(
        2, description="Random crops of each image whose features are computed; 0 for its centre crop alone."
    )
    epochs: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 256
    lr: Rates = Field((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), description="Learning rates to choose from.")
    weight_decay: Penalties = Field((0.0, 1e-6, 1e-4), description="L2 penalties to choose from.")
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of the training images on which the choice is made."
    )
    seed: Seed = 0


class SemisupConfig(Section):
    """Fine-tuning on few labels: the settings of the authors' README, the same for 1 % and 10 %."""

    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=2)] = 256
    lr_backbone: Annotated[float, Field(gt=0)] = 0.005
    lr_classifier: Annotated[float, Field(gt=0)] = 0.5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    seed: Seed = 0


class TransferConfig(Section):
    """Linear classifier of another data set on the frozen backbone; `eval.transfer` tells the sources."""

    epochs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Passes; not set: 14 for Places-205, 84 for iNaturalist 2018, 28 for others."
    )
    batch_size: Annotated[int, Field(ge=2)] = 256
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    milestones: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="Epochs after which the rate is divided by ten; not set: at a third and two thirds."
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    normalise: bool = Field(True, description="Batch-norm before the linear layer.")
    seed: Seed = 0


class Voc07Config(Section):
    """Linear SVMs on PASCAL VOC 2007: the settings of VISSL's benchmark."""

    grid: Annotated[int, Field(ge=1, le=7)] = Field(
        2, description="Side of the grid to which the last stage's map is averaged; 1 for its mean."
    )
    costs: Costs = (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    folds: Annotated[int, Field(ge=2)] = 3
    positive_weight: Annotated[float, Field(gt=0)] = 2
    max_iterations: Annotated[int, Field(ge=1)] = 2000
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class OnlineConfig(Section):
    """What is evaluated during training, where the dataset has labels; the network learns nothing from it."""

    probe: bool = Field(True, description="A linear classifier that learns from the features of each step.")
    probe_lr: Annotated[float, Field(gt=0)] = 3.0
    knn_every_epochs: Annotated[int, Field(ge=0)] = Field(
        10, description="How often neighbours classify held-out images; 0 for never."
    )
    knn_bank: Annotated[int, Field(ge=1)] = Field(
        10_000, description="Training images among which neighbours are sought; at most a fifth of them."
    )
    knn_queries: Annotated[int, Field(ge=1)] = Field(
        2_000, description="Images to classify; at most a twentieth of the number of training images."
    )
    test_path: Path | None = Field(
        None, description="Dataset to take these from; not set: training images outside the bank."
    )


class EvalConfig(Section):
    """All evaluations of a run."""

    features: FeaturesConfig = FeaturesConfig()
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    linear_fast: LinearFastConfig = LinearFastConfig()
    semisup: SemisupConfig = SemisupConfig()
    transfer: TransferConfig = TransferConfig()
    voc07: Voc07Config = Voc07Config()
    online: OnlineConfig = OnlineConfig()
