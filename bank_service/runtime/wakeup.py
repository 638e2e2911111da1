"""Wake-ups. One task sleeps until others have work for it."""

from __future__ import annotations

import asyncio


class WakeUp:
    """Used in one event loop. A wake-up that comes while the task is busy is not lost."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def wake(self) -> None:
        """Tells the task that there is work."""
        self._event.set()

    async def sleep(self) -> None:
        """Returns once ``wake`` has been called since the last return."""
        await self._event.wait()
        self._event.clear()
