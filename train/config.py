"""`RunConfig`: everything that fixes a run. Each section belongs to the folder it configures.

`load_config` reads a YAML recipe, applies `key.sub=value` overrides and reports the first mistake in one
sentence that names the file, the key and the nearest known key.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from eval.config import EvalConfig
from model.config import ModelConfig, Section
from pipelines.config import DataConfig
from train.errors import ConfigError
from train.files import write_text_atomically


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
    """A checkpoint is written at the end of each epoch and of the run, and more often by the clock."""

    every_minutes: Annotated[float, Field(gt=0)] | None = Field(
        15, description="Largest time between two checkpoints: what a killed run may lose."
    )
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
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = Field(
        "bf16",
        description="Of the passes through the network; weights, statistics and sums are fp32. fp64 has all "
        "of it in float64, from the initial weights of fp32: slow, on the CPU only, for comparing runs.",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: Annotated[int, Field(ge=1)] = 10
    micro_batches: Annotated[int, Field(ge=1)] = Field(
        1,
        description="Pieces in which each rank's samples go through the network, for batches that do not fit "
        "at once. The loss still sees the whole batch, but batch-norm normalises each piece by its own "
        "statistics, and running statistics advance once per piece.",
    )
    compile: bool = Field(
        False,
        description="Compile the network with torch.compile: slow to start, and needs a C++ compiler. For "
        "model.norm torch; the other norms, whose kernels are fused by hand, leave it little to do.",
    )
    cuda_graph: bool = Field(
        False,
        description="Record the step once and replay it, which spares the host its work; one GPU only.",
    )
    max_skipped_steps: Annotated[int, Field(ge=0)] = Field(
        20,
        description="A step whose loss or gradient is not finite changes nothing. The run stops after more "
        "such steps in a row.",
    )
    wandb: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Project of Weights & Biases that also receives the reports."
    )
    initial_weights: Path | None = Field(
        None,
        description="Start a new run from the weights in this file: a checkpoint of fastbarlow or of the "
        "authors, or a backbone alone, which leaves the projector as drawn. A run that goes on from its own "
        "checkpoint does not read it.",
    )
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _micro_batches_split_the_batch(self) -> "TrainConfig":
        if self.batch_size % self.micro_batches or self.batch_size < 2 * self.micro_batches:
            raise ValueError(
                f"micro_batches must divide batch_size into pieces of at least 2 samples, but they are "
                f"{self.micro_batches} and {self.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _cuda_graph_has_a_gpu(self) -> "TrainConfig":
        if self.cuda_graph and self.device == "cpu":
            raise ValueError("cuda_graph needs a GPU, but device is cpu; leave one of them out")
        return self

    @model_validator(mode="after")
    def _fp64_has_the_cpu(self) -> "TrainConfig":
        if self.precision == "fp64" and self.device == "cuda":
            raise ValueError("precision fp64 is for the CPU, but device is cuda; change one of them")
        return self

    @model_validator(mode="after")
    def _warmup_ends_before_the_run(self) -> "TrainConfig":
        if self.optim.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optim.warmup_epochs must be less than epochs, "
                f"but they are {self.optim.warmup_epochs:g} and {self.epochs}"
            )
        return self


class RunConfig(Section):
    """A whole run. Saved as `config.yaml` in the run directory."""

    run_dir: Path
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    data: DataConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the YAML recipe `path` describes, after `key.sub=value` overrides (values are YAML).

    Raises `ConfigError` for the first mistake, in one sentence.
    """
    settings = _read_yaml(path)
    overridden = [_apply_override(settings, override, path) for override in overrides]
    for error in _booleans(settings):
        raise ConfigError(_describe(error, path, overridden))
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_describe(error.errors()[0], path, overridden)) from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write every setting of `config` as YAML; `load_config` reads it back equal. Raises `OSError`."""
    write_text_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys below `section`, sections included, in the order of their definition."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if _is_section(field.annotation):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _annotation(key: str) -> Any:
    """The type of the known key `key`."""
    *sections, name = key.split(".")
    section = RunConfig
    for part in sections:
        section = section.model_fields[part].annotation
    return section.model_fields[name].annotation


def _booleans(settings: dict[str, Any], prefix: str = "") -> Iterator[ErrorDetails]:
    """Booleans where none belong: pydantic would take `yes`, which is `True` to YAML, for the number 1."""
    known = known_keys()
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _booleans(value, f"{key}.")
            continue
        items = value if isinstance(value, list) else [value]
        if key in known and _annotation(key) is not bool and any(isinstance(item, bool) for item in items):
            message = "Input should not be yes or no"
            yield ErrorDetails(type="boolean", loc=tuple(key.split(".")), msg=message, input=value)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML as the standard has it: a key that comes twice in a mapping is an error, not the last one's."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} comes twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def parse_yaml(text: str) -> Any:
    """Raises `yaml.YAMLError`."""
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # such as a date in month 13
        raise yaml.YAMLError(str(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the config {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The config {path} is not a UTF-8 text file.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"The config {path} is not valid YAML: {yaml_problem(error)}.") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"The config {path} must be a YAML mapping with the keys {_keys_at('')}.")
    return settings


def _apply_override(settings: dict[str, Any], override: str, path: Path) -> str:
    """Set one `key.sub=value` in `settings`, in place; returns the key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(
            f"The override {override!r} has no '='; write key.sub=value, e.g. train.epochs=100."
        )
    if key not in known_keys():
        raise ConfigError(f"The override {override!r} has an unknown key {key!r}; {_suggest(key)}.")
    try:
        value: Any = text.strip()
        # 2024-05-01 is a fine name of a folder, whatever YAML takes it for; only quotes are not part of it.
        if not value or value[0] in "'\"" or _annotation(key) not in (Path, str):
            value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"The value of the override {override!r} is not valid YAML: {yaml_problem(error)}."
        ) from None
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, start=1):
        if settings.get(section) is None:  # absent, or `section:` with nothing below it
            settings[section] = {}
        settings = settings[section]
        if not isinstance(settings, dict):
            prefix = ".".join(sections[:depth])
            raise ConfigError(f"{path}: {prefix} must be a section with the keys {_keys_at(prefix)}.")
    settings[name] = value
    return key


def yaml_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"


def _describe(error: ErrorDetails, path: Path, overridden: list[str]) -> str:
    """One sentence for one of pydantic's errors: origin, key, what is allowed, what was given."""
    key = ".".join(str(part) for part in error["loc"])
    origin = str(path)
    if any(key == name or key.startswith(f"{name}.") for name in overridden):
        origin = "override"
    elif any(name.startswith(f"{key}.") for name in overridden):
        origin = f"{path} with the overrides"  # a rule about several keys of the section
    given = error["input"]
    match error["type"]:
        case "extra_forbidden":
            return f"{origin}: unknown key {key!r}; {_suggest(key)}."
        case "missing" if isinstance(error["loc"][-1], int):
            return f"{origin}: {key.rpartition('.')[0]} needs more numbers than {given!r}."
        case "missing":
            return f"{origin}: the key {key} is missing; add it to the file or pass {key}=... as an override."
        case "model_type":
            return f"{origin}: {key} must be a section with the keys {_keys_at(key)}, not {given!r}."
        case "value_error":
            rule = error["msg"].removeprefix("Value error, ")
            return f"{origin}: {key}: {rule}."
        case _:
            return f"{origin}: {key}: {error['msg']}, but it is {given!r}."


def _keys_at(prefix: str) -> str:
    """The names of the keys directly below the section `prefix` ('' for the top), for a message."""
    start = f"{prefix}." if prefix else ""
    below = (key.removeprefix(start) for key in known_keys() if key.startswith(start))
    return ", ".join(name for name in below if "." not in name)


def _suggest(key: str) -> str:
    """The known key most like `key`, whole or by its last part; otherwise what its section allows."""

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return max(whole, last) + 0.1 * whole  # of two like names, the one in the like section

    known = known_keys()
    nearest = max((k for k in known if not key.startswith(f"{k}.")), key=likeness)
    if likeness(nearest) >= 0.7:
        return f"the nearest known key is {nearest!r}"
    section = key.rpartition(".")[0]
    where, names = (section, _keys_at(section)) if section in known else ("the top level", _keys_at(""))
    return f"the keys of {where} are {names}"
