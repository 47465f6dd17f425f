"""Settings of the evaluations on frozen features."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from model.config import Section


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
    """Linear probe on features computed once, without augmentation."""

    epochs: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 256
    lr: Annotated[float, Field(gt=0)] = 0.3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0


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
    online: OnlineConfig = OnlineConfig()
