"""The errors that configuration and training raise for the user to read, and all errors of that kind."""

from model.errors import ModelError
from pipelines.errors import DataError


class ConfigError(ValueError):
    """One sentence: which file and key is wrong, and what would be right."""


class TrainingError(RuntimeError):
    """One sentence: why training cannot start or go on, and what to do about it."""


class LostRankError(TrainingError):
    """The same of a rank that cannot go on without another one: the cause is that one's."""


USER_ERRORS = (ConfigError, DataError, ModelError, TrainingError)
