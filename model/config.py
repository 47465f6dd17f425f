"""Settings of the network and of the loss."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LossConfig(Section):
    """The Barlow Twins objective and the way it is computed."""

    invariance_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Weight of the invariance term; 0 leaves the redundancy term alone."
    )
    off_diagonal_weight: Annotated[float, Field(ge=0)] = Field(
        0.0051,
        description="Lambda: weight of the redundancy term (authors' code: 0.0051); 0 leaves the invariance "
        "term alone.",
    )
    normalise: Literal["batch", "features", "none"] = Field(
        "batch",
        description="What precedes the products of the features: each feature standardised over the batch "
        "(the paper's loss); that, and then each sample on the unit sphere; or only centred features.",
    )
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Takes the cross-entropy with this temperature instead of the squares."
    )
    algorithm: Literal["auto", "dense", "gram", "sharded"] = Field(
        "auto", description="Equal in result; auto takes the one that should be the quickest."
    )
    implementation: Literal["auto", "torch", "triton"] = Field(
        "auto", description="Of the passes around the matrix products; auto takes triton where it can run."
    )
    reference_world_size: Annotated[int, Field(ge=1)] = Field(
        1, description="Divides the gradient, as training on that many GPUs does in the authors' code."
    )

    @model_validator(mode="after")
    def _cross_entropy_has_an_algorithm(self) -> "LossConfig":
        if self.temperature is not None and self.algorithm not in ("auto", "dense"):
            raise ValueError(
                f"algorithm must be auto or dense where there is a temperature, not {self.algorithm}: the "
                "cross-entropy needs every element of C"
            )
        return self


class ModelConfig(Section):
    """Backbone, projector and loss."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    small_stem: bool = Field(False, description="3x3 stride-1 stem without max-pooling, for 32-pixel images.")
    zero_init_residual: bool = True
    projector: str = Field("8192-8192-8192", description="Widths of the projector's layers.")
    norm: Literal["twin", "torch", "apex"] = Field(
        "twin",
        description="Batch-norm: twin takes both views in one pass, with statistics per view; torch makes a "
        "pass for each view, as the authors do; apex is twin with the kernels of NVIDIA's apex.",
    )
    sync_bn: Literal["all", "projector", "none"] = Field(
        "all",
        description="Which batch-norms have statistics over all GPUs. The others have those of each GPU's "
        "own samples, and rank 0's running statistics are kept.",
    )
    loss: LossConfig = LossConfig()

    @field_validator("projector", mode="before")
    @classmethod
    def _single_width_may_be_a_number(cls, projector: object) -> object:
        return str(projector) if type(projector) is int else projector

    @field_validator("projector")
    @classmethod
    def _widths_are_positive_integers(cls, projector: str) -> str:
        widths = projector.split("-")
        if not all(w.isascii() and w.isdigit() and int(w) > 0 for w in widths):
            raise ValueError(
                f"projector must be widths joined by '-', such as 8192-8192-8192, not {projector!r}"
            )
        return projector

    @property
    def projector_widths(self) -> list[int]:
        return [int(width) for width in self.projector.split("-")]
