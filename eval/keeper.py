"""Where an evaluation keeps what it has finished, so that the same one goes on from there after a stop."""

from typing import Any, Protocol


class Keeper(Protocol):
    """A place for this very evaluation: checkpoint, settings and datasets are the caller's to tell apart.

    What is kept is tensors and plain data.
    """

    @property
    def is_due(self) -> bool:
        """Whether work in the middle of something long should be saved now."""

    def load(self, name: str) -> Any | None:
        """What was saved under this name, on the CPU; None where there is nothing, or nothing intact."""

    def save(self, name: str, value: Any) -> None:
        """Replace what is kept under this name; then as `stop_if_asked`."""

    def stop_if_asked(self) -> None:
        """For where nothing would be lost: raises an error if the evaluation is to stop."""


class _KeepsNothing:
    is_due = False

    def load(self, name: str) -> None:
        return None

    def save(self, name: str, value: Any) -> None:
        pass

    def stop_if_asked(self) -> None:
        pass


KEEP_NOTHING = _KeepsNothing()
