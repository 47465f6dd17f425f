"""Settings of the data path: which dataset, which loader, and the distribution of each view's distortions."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(ge=1e-3)]  # less would take the views out of float16's range
# Least and largest number of each range. Of the blur, what the registers of a GPU hold.
BOUNDS = {"crop_scale": (0, 1), "crop_ratio": (1e-3, 1e3), "blur_sigma": (0, 12)}


class Section(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ViewConfig(Section):
    """The random distortions of one view (paper, appendix A; the authors' `Transform`)."""

    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="Range of the crop's share of the area.")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="Range of the crop's width / height.")
    flip_p: Probability = 0.5
    jitter_p: Probability = 0.8
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grayscale_p: Probability = 0.2
    blur_p: Probability = 1.0
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="Range of the blur's sigma, in pixels.")
    solarize_p: Probability = 0.0

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "ViewConfig":
        for name, (least, most) in BOUNDS.items():
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two ascending positive numbers, not {low}, {high}")
            if low < least or high > most:
                raise ValueError(f"{name} must lie within {least:g} and {most:g}, not {low}, {high}")
        return self


# What the second view does differently (paper, appendix A).
VIEW_B = {"blur_p": 0.1, "solarize_p": 0.2}


class AugmentConfig(Section):
    """Both views' distortions and the normalisation after them."""

    view_a: ViewConfig = ViewConfig()
    view_b: ViewConfig = ViewConfig(**VIEW_B)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    implementation: Annotated[
        Literal["auto", "torch", "numba", "triton", "dali"],
        Field(
            description="What distorts: auto is triton on CUDA devices and numba on the CPU; dali is DALI's "
            "own operations, inside the loader dali, which are not quite the paper's."
        ),
    ] = "auto"

    @field_validator("view_b", mode="before")
    @classmethod
    def _settings_of_view_b_join_its_own_defaults(cls, view: object) -> object:
        """Else a recipe that sets one of them would give the second view the first one's defaults."""
        return VIEW_B | view if isinstance(view, dict) else view

    @property
    def views(self) -> tuple[ViewConfig, ViewConfig]:
        return self.view_a, self.view_b

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scale and offset per channel that take pixels of 0 to 255 to normalised values."""
        scale_C = tuple(1 / (255 * std) for std in self.std)
        return scale_C, tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))


class DaliConfig(Section):
    """How DALI decodes; the loader `dali` alone reads it."""

    device: Annotated[
        Literal["auto", "cpu", "gpu"],
        Field(description="What decodes: auto is the GPU where the training is on one."),
    ] = "auto"
    hardware_decoder_share: Annotated[
        float, Field(ge=0, le=1, description="Share of the JPEGs for the GPU's own decoder, if it has one.")
    ] = 0.65
    decoder_memory: Annotated[
        int | None,
        Field(
            ge=1,
            description="MiB that each decoding thread reserves on the GPU, and twice that, pinned, on the "
            "host. Not set: what the largest image of a .beton file needs.",
        ),
    ] = None


class DataConfig(Section):
    """Where the images are and how they reach the device."""

    path: Path = Field(
        description="A .beton file, a folder of images or of shards, torchvision:NAME:ROOT[:SPLIT], "
        "places205:ROOT or inat18:ROOT."
    )
    loader: Literal["folder", "ffcv", "dali", "synthetic"] = "ffcv"
    image_size: Annotated[int, Field(ge=8, le=512)] = 224
    workers: Annotated[int, Field(ge=0, le=256, description="Decoding threads or processes per rank.")] = 8
    prefetch: Annotated[int, Field(ge=1, le=16, description="Batches prepared ahead.")] = 3
    on_bad_sample: Annotated[
        Literal["replace", "stop"],
        Field(description="An image that cannot be read: train on the next one instead, or stop the run."),
    ] = "replace"
    dali: DaliConfig = DaliConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _dali_distorts_what_dali_loads(self) -> "DataConfig":
        if self.augment.implementation == "dali" and self.loader != "dali":
            raise ValueError(f"augment.implementation dali needs loader dali, not {self.loader}")
        return self
