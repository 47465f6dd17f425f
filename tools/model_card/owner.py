"""What the owner of a network says of it, from a YAML file."""

import difflib
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from model.config import Section
from train.config import parse_yaml, yaml_problem
from train.errors import ConfigError

Words = Annotated[str, Field(min_length=1)]


class OwnerTexts(Section):
    """Texts for the card; what is not set stays unknown there."""

    owner: Words | None = None
    contact: Words | None = None
    licence: Words | None = Field(None, description="Of the weights: cc-by-nc-4.0 and the like, or a name.")
    intended_use: Words | None = None
    disallowed_use: Words | None = None
    datasets: tuple[Words, ...] = Field((), description="Names on Hugging Face, such as imagenet-1k.")
    hardware: Words | None = Field(None, description="What the run was trained on; it does not record it.")


def read_owner_texts(path: Path) -> OwnerTexts:
    """Raises `ConfigError`, one sentence, where the YAML file cannot be read or has other keys."""
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
        return OwnerTexts.model_validate({} if content is None else content)
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}; pass a YAML file to --card.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a UTF-8 text file; pass a YAML file to --card.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {yaml_problem(error)}; correct it.") from None
    except ValidationError as error:
        raise ConfigError(_describe(error, path)) from None


def _describe(error: ValidationError, path: Path) -> str:
    first = error.errors()[0]
    key, known = ".".join(map(str, first["loc"])), list(OwnerTexts.model_fields)
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, known, 1)
        hint = f"the nearest known key is {nearest[0]!r}" if nearest else f"the keys are {', '.join(known)}"
        return f"{path}: unknown key {key!r}; {hint}."
    if not key:
        return f"{path} must be a YAML mapping with the keys {', '.join(known)}."
    return f"{path}: {key}: {first['msg']}, but it is {first['input']!r}."
