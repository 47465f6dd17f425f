"""Settings of detection, and the published ones (paper, appendix C.2)."""

from typing import Annotated

from pydantic import Field, model_validator

from model.config import Section


class DetectionConfig(Section):
    """How a detector is fine-tuned from a backbone, all layers of it, and tested."""

    iterations: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = Field(16, description="Images of an iteration, of all ranks.")
    lr: Annotated[float, Field(gt=0)]
    milestones: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        description="Iterations after which the learning rate is a tenth of what it was."
    )
    warmup_iterations: Annotated[int, Field(ge=0)] = 1000
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Share of the learning rate at the start of the warm-up, which is linear."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-4, description="Of all but batch-norms.")
    short_sides: Annotated[tuple[Annotated[int, Field(ge=32)], ...], Field(min_length=1)] = Field(
        description="Pixels; in training one is drawn for each image, in tests it is the last one."
    )
    long_side: Annotated[int, Field(ge=32)] = Field(1333, description="No image gets longer than that.")
    regions: Annotated[int, Field(ge=1)] = Field(512, description="Per image that res5 learns from.")
    test_proposals: Annotated[int, Field(ge=1)] = Field(
        1000, description="Per image that res5 looks at in tests."
    )
    statistics_iterations: Annotated[int, Field(ge=0)] = Field(
        200, description="After training, to measure the statistics of the batch-norms anew."
    )
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    workers: Annotated[int, Field(ge=0, le=256)] = Field(4, description="Decoding processes per rank.")
    log_every: Annotated[int, Field(ge=1)] = 20
    save_every_minutes: Annotated[float, Field(gt=0)] = 10

    @model_validator(mode="after")
    def _sides_are_in_order(self) -> "DetectionConfig":
        if max(self.short_sides) > self.long_side:
            raise ValueError(
                f"long_side must be at least as long as every short side, but it is {self.long_side} and "
                f"they go up to {max(self.short_sides)}"
            )
        return self

    def with_iterations(self, iterations: int) -> "DetectionConfig":
        """The same schedule, stretched or shrunk to another number of iterations."""

        def scaled(count: int) -> int:
            return round(count * iterations / self.iterations)

        return self.model_copy(
            update={
                "iterations": iterations,
                "milestones": tuple(map(scaled, self.milestones)),
                "warmup_iterations": min(self.warmup_iterations, scaled(self.warmup_iterations)),
                "statistics_iterations": min(self.statistics_iterations, iterations),
            }
        )

    def with_short_side(self, short_side: int) -> "DetectionConfig":
        """One size for training and tests; the longest side keeps its proportion to it."""
        long_side = round(self.long_side * short_side / self.short_sides[-1])
        return self.model_copy(update={"short_sides": (short_side,), "long_side": long_side})


PUBLISHED = {
    "voc": DetectionConfig(  # 24k iterations on VOC07+12
        iterations=24_000,
        lr=0.1,
        milestones=(18_000, 22_000),
        warmup_factor=0.333,
        short_sides=tuple(range(480, 801, 32)),
    ),
    "coco": DetectionConfig(  # detectron2's 1x schedule with another learning rate
        iterations=90_000,
        lr=0.03,
        milestones=(60_000, 80_000),
        warmup_factor=0.001,
        short_sides=tuple(range(640, 801, 32)),
    ),
}

# A fine-tuning may go on under other values of these: they change neither its samples nor its steps.
FREE_KEYS = ("statistics_iterations", "workers", "log_every", "save_every_minutes")
