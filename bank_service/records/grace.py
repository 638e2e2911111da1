"""The grace period: the time between a gradient's last document and its removal from an object store."""

from __future__ import annotations

import time
from collections.abc import Iterable


class Grace:
    """Digests that wait for their removal. A digest that is added again waits anew. Used in one event loop."""

    def __init__(self, seconds: float) -> None:
        """False as a condition if ``seconds`` is 0."""
        self._seconds = seconds
        self._until: dict[str, float] = {}  # digest → end of its wait on the monotonic clock, the earliest first

    def __bool__(self) -> bool:
        return self._seconds > 0

    def add(self, digests: Iterable[str]) -> None:
        until = time.monotonic() + self._seconds
        for digest in digests:
            self._until.pop(digest, None)
            self._until[digest] = until

    def take(self) -> list[str]:
        """All digests. They wait no more."""
        found = list(self._until)
        self._until.clear()
        return found

    def due(self) -> list[str]:
        """The digests whose wait is over. They wait no more."""
        now = time.monotonic()
        found = []
        for digest, until in self._until.items():
            if until > now:
                break
            found.append(digest)
        for digest in found:
            del self._until[digest]
        return found
