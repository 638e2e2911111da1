"""What a request holds while it is answered, its adapter's slot and its gradients in the arena, and when that goes."""

from __future__ import annotations

import asyncio

from regrad_vllm.serve.engine import Engine
from regrad_vllm.serve.retriever import Prepared

_POLL_SECONDS = 0.05


class Pins:
    """Of one request."""

    def __init__(self, prepared: Prepared, engine: Engine, releases: set[asyncio.Task[None]]) -> None:
        """releases: where tasks that wait for the engine are kept."""
        self._prepared = prepared
        self._engine = engine
        self._releases = releases

    def release(self, *, clean: bool) -> None:
        """Gives everything back, not before the engine has stopped using the adapter for this request.

        A request that ended well (``clean``) is over, but for a last step that keeps its slot by itself
        (``Slots.begin_step``). One whose client hung up, or that failed, may still run until its abort arrives, and its
        adapter may have to be composed again in that time. What it has in the engine now is all that it will ever have
        there, so the wait is no longer than that lives; others with the same adapter have pins of their own.
        """
        if clean or self._prepared.place is None:
            self.let_go()
            return
        task = asyncio.get_running_loop().create_task(self._let_go_later(self._unfinished()))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    def let_go(self) -> None:
        """Gives everything back at once: nothing was asked of the engine, or it is done."""
        if self._prepared.place is not None:
            self._engine.release(self._prepared.place)
        self._prepared.lease.release()

    async def _let_go_later(self, running: frozenset[str]) -> None:
        try:
            while self._engine.still_runs(running):
                await asyncio.sleep(_POLL_SECONDS)
            await self._engine.settled()  # its last step may still run, on the adapter's slot
        finally:
            self.let_go()

    def _unfinished(self) -> frozenset[str]:
        place = self._prepared.place
        assert place is not None
        return self._engine.unfinished(self._prepared.used.request_id, place.recipe)
