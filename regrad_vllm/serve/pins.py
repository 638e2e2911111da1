"""What a request holds while it is answered, its adapter's slot and its gradients in the arena, and when that goes."""

from __future__ import annotations

import asyncio

from regrad_vllm.serve.engine import Engine
from regrad_vllm.serve.retriever import Prepared

_POLL_SECONDS = 0.05
_LOOK_SECONDS = 5.0  # an answer that takes longer is looked after


class Pins:
    """Of one request."""

    def __init__(self, prepared: Prepared, engine: Engine, releases: set[asyncio.Task[None]]) -> None:
        """releases: where tasks that wait for the engine are kept."""
        self._prepared = prepared
        self._engine = engine
        self._releases = releases
        self._has_slot = prepared.place is not None
        self._looking = asyncio.create_task(self._look_after()) if self._has_slot else None

    def release(self, *, clean: bool) -> None:
        """Gives everything back, not before the engine has stopped using the adapter for this request.

        A request that ended well (``clean``) is over, but for a last step that keeps its slot by itself
        (``Slots.begin_step``). One whose client hung up, or that failed, may still run until its abort arrives, and its
        adapter may have to be composed again in that time. What it has in the engine now is all that it will ever have
        there, so the wait is no longer than that lives; others with the same adapter have pins of their own.
        """
        if self._looking is not None:
            self._looking.cancel()
        if clean or not self._has_slot:
            self._let_go()
            return
        task = asyncio.get_running_loop().create_task(self._let_go_later(self._unfinished()))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    def _let_go(self) -> None:
        self._give_slot_back()
        self._prepared.lease.release()

    async def _let_go_later(self, running: frozenset[str]) -> None:
        try:
            while self._engine.still_runs(running):
                await asyncio.sleep(_POLL_SECONDS)
            await self._engine.settled()  # its last step may still run, on the adapter's slot
        finally:
            self._let_go()

    async def _look_after(self) -> None:
        """Gives the slot back while the client still reads: one that stops reading must not keep others from theirs.

        Where the engine is given more for the same request later, it composes the adapter again, in its step, from
        what the lease keeps in the arena. So nothing for two looks, not between two searches of a beam.
        """
        idle = 0
        while idle < 2:
            await asyncio.sleep(_LOOK_SECONDS)
            idle = 0 if self._unfinished() else idle + 1
        self._give_slot_back()

    def _unfinished(self) -> frozenset[str]:
        place = self._prepared.place
        assert place is not None
        return self._engine.unfinished(self._prepared.used.request_id, place.recipe)

    def _give_slot_back(self) -> None:
        if self._has_slot and self._prepared.place is not None:
            self._has_slot = False
            self._engine.release(self._prepared.place)
