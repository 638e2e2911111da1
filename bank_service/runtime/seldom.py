"""Log messages about a lasting fault, once a minute."""

from __future__ import annotations

import time

LOG_SECONDS = 60.0


class Seldom:
    """Tells whether to log a message again."""

    def __init__(self) -> None:
        self._said: float | None = None

    def is_due(self) -> bool:
        """True at the first call, and then once in LOG_SECONDS."""
        now = time.monotonic()
        if self._said is not None and now < self._said + LOG_SECONDS:
            return False
        self._said = now
        return True
