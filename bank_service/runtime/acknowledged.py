"""The acknowledged sequence: how far callers know the bank."""

from __future__ import annotations

from collections.abc import Callable


class AcknowledgedSequence:
    """The sequence of the last change that a caller was told of.

    Every change of the catalog has a sequence number. A query that begins now must see each change up to this one. So
    it waits until the vectors reflect it; a change that is durable but not acknowledged may show or not.
    """

    def __init__(self) -> None:
        self._value = 0
        self._listeners: list[Callable[[], None]] = []

    @property
    def value(self) -> int:
        """0 before the first change."""
        return self._value

    def advance(self, sequence: int) -> None:
        """To be called before the caller is told. An older sequence changes nothing."""
        self._value = max(self._value, sequence)
        for listener in self._listeners:
            listener()

    def on_advance(self, listener: Callable[[], None]) -> None:
        """Calls ``listener`` after each ``advance``."""
        self._listeners.append(listener)
