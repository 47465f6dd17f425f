"""The one error that the model raises for bad input."""


class ModelError(ValueError):
    """One sentence for the user: what does not fit the model, where, and what to do about it."""
