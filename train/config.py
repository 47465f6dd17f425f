"""`RunConfig`: everything that fixes a run. Each section belongs to the folder it configures.

`load_config` reads a YAML recipe, applies `key.sub=value` overrides and reports the first mistake in one
sentence that names the file, the key and the nearest known key.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from eval.config import EvalConfig
from model.config import ModelConfig, Section
from pipelines.config import DataConfig
from train.errors import ConfigError


class OptimConfig(Section):
    """LARS and its schedule (paper section 2.2; the authors' main.py)."""

    lr_weights: Annotated[float, Field(gt=0)] = Field(0.2, description="Per 256 samples of the global batch.")
    lr_biases: Annotated[float, Field(gt=0)] = Field(
        0.0048, description="For biases and norm parameters, per 256 samples of the global batch."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    eta: Annotated[float, Field(gt=0)] = Field(0.001, description="LARS trust coefficient.")
    warmup_epochs: Annotated[float, Field(ge=0)] = 10
    final_lr_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.001, description="The cosine ends at this share of the base rate."
    )


class CheckpointConfig(Section):
    """A checkpoint is written at the end of each epoch and of the run; more often if asked."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    resume: bool = Field(True, description="Go on from the run directory's last checkpoint, if it has one.")


class TrainConfig(Section):
    """The training loop."""

    epochs: Annotated[int, Field(ge=1)] = 1000
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Stop after that many steps; the schedule still spans all epochs."
    )
    batch_size: Annotated[int, Field(ge=2, description="Global batch: samples per step over all ranks.")] = (
        2048
    )
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: Annotated[int, Field(ge=1)] = 10
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


class RunConfig(Section):
    """A whole run. Saved as `config.yaml` in the run directory."""

    run_dir: Path
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    data: DataConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
