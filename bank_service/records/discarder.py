"""Removes gradients that no document names any more, from the blob store and the cache."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from concurrent.futures import Executor

from bank_service.errors import CatalogReadError, UnavailableError
from bank_service.records.grace import Grace
from bank_service.records.stores import Stores
from bank_service.runtime.metrics import BankMetrics
from bank_service.runtime.seldom import Seldom
from bank_service.runtime.threads import in_thread

logger = logging.getLogger(__name__)


class Discarder:
    """Removes gradients in batches. ``retry`` repeats the removals that failed. After a crash, the first sweep finds
    them.

    In an object store, a gradient goes only if nothing names it at the begin of the grace period nor at its end.
    """

    def __init__(self, stores: Stores, pool: Executor, metrics: BankMetrics, grace_seconds: float) -> None:
        self._catalog = stores.catalog
        self._blobs = stores.blobs
        self._cache = stores.cache
        self._pool = pool
        self._metrics = metrics
        self._grace = Grace(grace_seconds if stores.blobs.is_remote else 0.0)
        self._failed: set[str] = set()
        self._spared: set[str] = set()  # records that a snapshot under way holds
        self._must_sweep = False  # the last sweep of all records failed
        self._knows_orphans = False  # those of earlier processes are in their grace period
        self._sweep_failures = Seldom()

    async def sweep(self) -> None:
        """Removes all gradients that nothing names. A crash between the blob's write and the catalog's leaves some."""
        if self._grace:
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
        if self._grace and not at_once:
            self._grace.add(wanted)
        elif wanted:
            await self._remove(wanted)

    async def erase(self, digests: Iterable[str]) -> None:
        """Removes them at once, and all gradients in their grace period. A purged document may have been deleted
        before, and then nobody knows which of them were its own. UnavailableError if a gradient could not be removed
        from the blob store."""
        error: Exception | None = None
        if self._grace and not self._knows_orphans:
            error = await self._find_orphans()
        wanted = list(dict.fromkeys((*digests, *self._grace.take())))
        if wanted:
            _, failure = await self._remove(wanted)
            error = failure or error
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
        if self._must_sweep:
            await self.sweep()
        if not self._blobs.is_holding_all:
            await self.discard(self._failed | self._spared, at_once=True)
            if due := self._grace.due():
                removed, _ = await self._remove(due)
                self._metrics.swept(removed)
        await self._cache.retry()

    async def close(self) -> None:
        """Call it last, before the catalog is closed."""
        try:
            await in_thread(self._pool, self._blobs.close)
        except (OSError, CatalogReadError) as error:
            logger.warning("the catalog's sequence can't be noted beside the gradients: %s", error)

    async def _keep(self) -> None:
        try:
            await in_thread(self._pool, self._blobs.keep)
        except (OSError, CatalogReadError) as error:
            self._warn(error)

    async def _find_orphans(self) -> Exception | None:
        """Lets all orphans wait for their removal. Returns the error."""
        try:
            self._grace.add(await in_thread(self._pool, self._blobs.orphans, self.references))
        except (OSError, CatalogReadError) as error:
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
        except (OSError, CatalogReadError) as error:  # the blobs can't be listed or the catalog can't be read
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
