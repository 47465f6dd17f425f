"""The errors that configuration and training raise for the user to read."""


class ConfigError(ValueError):
    """One sentence: which file and key is wrong, and what would be right."""


class TrainingError(RuntimeError):
    """One sentence: why training cannot start or go on, and what to do about it."""
