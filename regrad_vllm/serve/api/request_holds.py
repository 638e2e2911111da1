"""The holds of one request: its documents in the workers and in the arena. Decides when they end."""

from __future__ import annotations

import asyncio

from regrad_vllm.serve.api.engine import Engine
from regrad_vllm.serve.api.preparer import PreparedRequest

_POLL_SECONDS = 0.05


class RequestHolds:
    """The holds of one request. They must be released once."""

    def __init__(self, prepared: PreparedRequest, engine: Engine, releases: set[asyncio.Task[None]]) -> None:
        """releases: the set that keeps the tasks waiting for the engine alive."""
        self._prepared = prepared
        self._engine = engine
        self._releases = releases

    def release(self, *, clean: bool) -> None:
        """Ends the holds when the engine no longer needs them for this request.

        A request that ended well (``clean``) is over, except for a last step, which has a hold of its own. A request
        that failed, or whose client hung up, runs on until its abort arrives. It may not have had a first step yet, so
        the holds wait for its last parts in the engine. Other requests with the same adapter have separate holds.
        """
        if clean or self._prepared.placement is None:
            self.let_go()
            return
        task = asyncio.get_running_loop().create_task(self._let_go_later(self._unfinished()))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    def let_go(self) -> None:
        """Ends the holds at once. The engine must be done with the request, or never have got it."""
        if self._prepared.placement is not None:
            self._engine.release(self._prepared.placement)
        self._prepared.found.gradients.release()

    async def _let_go_later(self, running: frozenset[str]) -> None:
        try:
            while self._engine.still_runs(running):
                await asyncio.sleep(_POLL_SECONDS)
            await self._engine.settled()  # the abort is on its way, and the engine may begin the request before
        finally:
            self.let_go()

    def _unfinished(self) -> frozenset[str]:
        placement = self._prepared.placement
        assert placement is not None
        return self._engine.unfinished(self._prepared.used.request_id, placement.recipe)
