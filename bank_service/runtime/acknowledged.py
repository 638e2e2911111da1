"""The acknowledged sequence: the last change that a caller knows of."""

from __future__ import annotations

from collections.abc import Callable


class AcknowledgedSequence:
    """The sequence of the last change that a caller was told of.

    Every change of the catalog has a sequence number. A query must see each change up to this one, so it waits until
    the vectors reflect it. It may or may not see a durable change that is not acknowledged yet.
    """

    def __init__(self) -> None:
        self._value = 0
        self._listeners: list[Callable[[], None]] = []

    @property
    def value(self) -> int:
        """0 before the first change."""
        return self._value

    def advance(self, sequence: int) -> None:
        """Call it before the caller gets the answer. An older sequence changes nothing."""
        self._value = max(self._value, sequence)
        for listener in self._listeners:
            listener()

    def on_advance(self, listener: Callable[[], None]) -> None:
        """Calls ``listener`` after each ``advance``."""
        self._listeners.append(listener)
