"""The one error that the data path raises for bad input."""


class DataError(ValueError):
    """One sentence for the user: what is wrong with the data, where, and what to do about it."""
