"""Removes gradients that no document names any more, from the blob store and the cache."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable
from concurrent.futures import Executor

from bank_service.blobs.objects import ObjectBusyError
from bank_service.catalog.nodes import REMOVAL_SECONDS, leads
from bank_service.errors import UnavailableError
from bank_service.records.grace import Grace, OwnGrace, SharedGrace, Waits
from bank_service.records.stores import Stores
from bank_service.runtime.metrics import BankMetrics
from bank_service.runtime.seldom import Seldom
from bank_service.runtime.threads import in_thread

logger = logging.getLogger(__name__)

BUSY_SECONDS = REMOVAL_SECONDS  # the longest wait of a purge for other nodes; all that they decided has begun by then
PAUSE_SECONDS = 0.1


class Discarder:
    """Removes gradients in batches. ``retry`` repeats the removals that failed. After a crash, the first sweep finds
    them.

    In an object store, a gradient goes only if nothing names it at the begin of the grace period nor at its end. If
    several nodes have the store, the one that does the upkeep looks after the wait and the orphans of all.
    """

    def __init__(self, stores: Stores, pool: Executor, metrics: BankMetrics, grace_seconds: float) -> None:
        self._catalog = stores.catalog
        self._blobs = stores.blobs
        self._cache = stores.cache
        self._pool = pool
        self._metrics = metrics
        self._nodes = nodes = stores.catalog.nodes
        self._grace: Grace
        if nodes is None:
            self._grace = OwnGrace(grace_seconds if stores.blobs.is_remote else 0.0)
        else:
            self._grace = SharedGrace(nodes, grace_seconds, pool)
        self._failed: set[str] = set()
        self._spared: set[str] = set()  # records that a snapshot under way holds
        self._must_sweep = False  # the last sweep of all records failed
        self._knows_orphans = False  # those of earlier processes are in their grace period
        self._led = False  # this bank did the upkeep at the last look
        self._sweep_failures = Seldom()

    async def sweep(self) -> None:
        """Removes all gradients that nothing names. A crash between the blob's write and the catalog's leaves some.

        Does nothing where another node does the upkeep.
        """
        if not leads(self._catalog):
            return
        self._led = True
        if self._grace.is_needed:
            await self._find_orphans()
            return
        removed, _ = await self._remove(None)
        if removed:
            self._metrics.swept(removed)
            logger.info("removed %d gradients that no document names", removed)

    async def discard(self, digests: Iterable[str], *, at_once: bool = False) -> None:
        """Removes those of ``digests`` that no document or past version names. ``retry`` repeats failed removals.

        ``at_once``: without a grace period.
        """
        wanted = list(dict.fromkeys(digests))
        if self._grace.is_needed and not at_once:
            await self._grace.add(wanted)
        elif wanted:
            await self._remove(wanted)

    async def erase(self, digests: Iterable[str]) -> None:
        """Removes them at once, and all gradients in their grace period. A purged document may have been deleted
        before, and then nobody knows which of them were its own. UnavailableError if a gradient could not be removed
        from the blob store."""
        error: Exception | None = None
        try:
            if self._grace.is_needed and not await self._has_orphans_waiting():
                error = await self._find_orphans()
            waiting = await self._grace.all()
            if wanted := list(dict.fromkeys((*digests, *waiting))):
                error = await self._remove_from_all(wanted) or error
            await self._grace.forget(self._without_failed(waiting))
        except UnavailableError as unavailable:
            error = unavailable
        if isinstance(error, ObjectBusyError):
            raise UnavailableError(
                f"gradients must not be in use by other nodes for a purge, got {error}; the document is deleted, but "
                "not all of its gradients are erased: purge it again in a minute (the bank tries by itself, too)"
            ) from error
        if error is not None:
            raise UnavailableError(
                f"gradients must be removable from the blob store, got {error}; the document is deleted, but not all "
                "of its gradients are erased: mend the disk and purge it again (the bank tries by itself, too)"
            ) from error

    def is_done(self, digests: Collection[str]) -> bool:
        """Whether ``retry`` has nothing left to do for ``digests``."""
        left = (self._failed, self._spared)
        return all(each.isdisjoint(digests) for each in left) and not self._cache.may_have(digests)

    async def retry(self) -> None:
        """Repeats the removals that failed."""
        await self._keep()
        does_upkeep = await self._is_leading()
        if self._must_sweep and does_upkeep:
            await self.sweep()
        if not self._blobs.is_holding_all:
            await self.discard(self._failed | self._spared, at_once=True)
            if does_upkeep and (due := self._without_failed(await self._grace.due())):
                removed, _ = await self._remove(list(due))
                self._metrics.swept(removed)
                await self._grace.forget(self._without_failed(due))
        await self._cache.retry()

    async def close(self) -> None:
        """Call it last, before the catalog is closed."""
        try:
            await in_thread(self._pool, self._blobs.close)
        except (OSError, UnavailableError) as error:
            logger.warning("the catalog's sequence can't be noted beside the gradients: %s", error)

    async def _keep(self) -> None:
        try:
            await in_thread(self._pool, self._blobs.keep)
        except (OSError, UnavailableError) as error:
            self._warn(error)

    async def _is_leading(self) -> bool:
        """Whether this bank does the upkeep. One that begins to must look for the orphans of others."""
        if self._nodes is None:
            return True
        led, self._led = self._led, self._nodes.leads
        if self._led and not self._must_sweep:
            self._must_sweep = not led or bool(await in_thread(self._pool, self._nodes.ended))
        return self._led

    async def _has_orphans_waiting(self) -> bool:
        """The orphans of processes that have ended are in their grace period."""
        if self._nodes is None:
            return self._knows_orphans
        return not await in_thread(self._pool, self._nodes.ended)

    async def _remove_from_all(self, digests: list[str]) -> Exception | None:
        """Waits a little for other nodes that write or remove the same gradients. Returns the error."""
        deadline = time.monotonic() + BUSY_SECONDS
        _, failure = await self._remove(digests)
        while isinstance(failure, ObjectBusyError) and time.monotonic() < deadline:
            await asyncio.sleep(PAUSE_SECONDS)
            digests = [digest for digest in digests if digest in self._failed]
            _, failure = await self._remove(digests)
        return failure

    def _without_failed(self, waits: Waits) -> Waits:
        """Those whose removal did not fail. The others still wait, because this node may end before it succeeds."""
        return {digest: wait for digest, wait in waits.items() if digest not in self._failed}

    async def _find_orphans(self) -> Exception | None:
        """Lets all orphans wait for their removal. Returns the error."""
        try:
            ended = [] if self._nodes is None else await in_thread(self._pool, self._nodes.ended)
            await self._grace.add(await in_thread(self._pool, self._blobs.orphans, self.references))
            if self._nodes is not None:
                await in_thread(self._pool, self._nodes.remember_ended, ended)
        except (OSError, UnavailableError) as error:
            self._must_sweep = True
            self._warn(error)
            return error
        self._must_sweep = False
        self._knows_orphans = True
        return None

    def _warn(self, error: Exception) -> None:
        if self._sweep_failures.is_due():
            logger.warning("gradients that no document names can't be removed: %s; trying again", error)

    async def _remove(self, digests: list[str] | None) -> tuple[int, Exception | None]:
        try:
            sweep = await in_thread(self._pool, self._blobs.sweep, self.references, digests)
        except (OSError, UnavailableError) as error:  # the blobs can't be listed or the catalog can't be asked
            self._warn(error)
            self._failed.update(digests or ())
            self._must_sweep |= digests is None
            return 0, error
        if digests is None:
            self._must_sweep = False
        new = sweep.failed.keys() - self._failed
        self._failed.difference_update(digests or ())
        self._failed.update(sweep.failed)
        self._spared.difference_update(digests or ())
        self._spared |= sweep.spared
        if new:
            logger.warning(
                "%d gradients that no document names can't be removed: %s; trying again",
                len(new),
                sweep.failed[min(new)],
            )
        # Digests without a file too: the file may have been removed while the cache did not answer.
        if sweep.unwanted:
            await self._cache.remove(sorted(sweep.unwanted))
        return sweep.num_removed, next(iter(sweep.failed.values()), None)

    def references(self, digests: list[str]) -> set[str]:
        with self._catalog.view() as view:
            return set(view.gradient_sizes(digests))
