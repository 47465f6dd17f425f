"""Settings of an audit: how many images, and from where on something is worth a word."""

from typing import Annotated

from pydantic import Field

from model.config import Section

Share = Annotated[float, Field(ge=0, le=1)]


class SilentConfig(Section):
    """What two encoders must have in common for one to replace the other without a word to its users."""

    cosine: Share = Field(0.99, description="Mean cosine of the two features of an image; one width only.")
    cka: Share = Field(0.99, description="Linear CKA, debiased.")
    overlap: Share = Field(0.9, description="Share of the nearest neighbours that are the same.")
    agreement: Share = Field(0.98, description="Share of images that get the same class from neighbours.")
    class_drop: Share = Field(
        0.02, description="Largest loss of accuracy of a class; only classes of min_group images count."
    )


class AuditConfig(Section):
    """How an embedding is looked at."""

    images: Annotated[int, Field(ge=20)] = Field(2_000, description="At most so many, drawn by seed.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    neighbours: Annotated[int, Field(ge=1)] = Field(10, description="On a sheet, and for the overlap.")
    sheet_rows: Annotated[int, Field(ge=1, le=100)] = Field(10, description="Queries on a sheet, at most.")
    k: Annotated[int, Field(ge=1)] = Field(20, description="Neighbours that vote; fewer if there are few.")
    temperature: Annotated[float, Field(gt=0)] = Field(0.07, description="Of the votes, as in eval.knn.")
    min_group: Annotated[int, Field(ge=1)] = Field(
        30, description="A group with fewer images is said to be too small."
    )
    distorted_images: Annotated[int, Field(ge=2)] = Field(
        256, description="Images that are distorted, at most; each once for each strength."
    )
    folds: Annotated[int, Field(ge=2)] = Field(5, description="Of the probes' cross-validation.")
    shuffles: Annotated[int, Field(ge=1)] = Field(3, description="Probes of shuffled values, the baseline.")
    dead_share: Share = Field(
        0.01, description="A dimension that varies less than this share of the median one is dead."
    )
    correlated: Share = Field(0.9, description="From this |correlation| on two dimensions are redundant.")
    silent: SilentConfig = SilentConfig()
