"""Removes gradients that no document names any more, from the blob store and the cache."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from concurrent.futures import Executor

from bank_service.errors import CatalogReadError, UnavailableError
from bank_service.records.stores import Stores
from bank_service.runtime.metrics import BankMetrics
from bank_service.runtime.seldom import Seldom
from bank_service.runtime.threads import in_thread

logger = logging.getLogger(__name__)


class Discarder:
    """Removes gradients in batches. ``retry`` repeats the removals that failed. After a crash, the first sweep finds
    them."""

    def __init__(self, stores: Stores, pool: Executor, metrics: BankMetrics) -> None:
        self._catalog = stores.catalog
        self._blobs = stores.blobs
        self._cache = stores.cache
        self._pool = pool
        self._metrics = metrics
        self._failed: set[str] = set()
        self._spared: set[str] = set()  # records that a snapshot under way holds
        self._must_sweep = False  # the last sweep of all records failed
        self._sweep_failures = Seldom()

    async def sweep(self) -> None:
        """Removes all gradients that nothing names. A crash between the blob's write and the catalog's leaves some."""
        removed, _ = await self._remove(None)
        if removed:
            self._metrics.swept(removed)
            logger.info("removed %d gradients that no document names (left by a crash)", removed)

    async def discard(self, digests: Iterable[str]) -> None:
        """Removes those of ``digests`` that no document or past version names. ``retry`` repeats failed removals."""
        if wanted := list(dict.fromkeys(digests)):
            await self._remove(wanted)

    async def erase(self, digests: Iterable[str]) -> None:
        """Does the same as ``discard``. UnavailableError if a gradient could not be removed from the blob store."""
        wanted = list(dict.fromkeys(digests))
        _, error = await self._remove(wanted) if wanted else (0, None)
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
        if self._must_sweep:
            await self.sweep()
        if not self._blobs.is_holding_all:
            await self.discard(self._failed | self._spared)
        await self._cache.retry()

    async def _remove(self, digests: list[str] | None) -> tuple[int, Exception | None]:
        try:
            sweep = await in_thread(self._pool, self._blobs.sweep, self.references, digests)
        except (OSError, CatalogReadError) as error:  # the blobs can't be listed or the catalog can't be read
            if self._sweep_failures.is_due():
                logger.warning("gradients that no document names can't be removed: %s; trying again", error)
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
