"""Reads gradient records from the cache, or from the blobs on a cache miss. Every record is verified."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from bank_service.errors import DataLossError, NotFoundError
from bank_service.records.stores import Pools, Stores
from bank_service.runtime.background import Background
from bank_service.runtime.metrics import BankMetrics
from bank_service.runtime.threads import in_thread
from bank_service.wire.tracing import span

MayRead = Callable[[str], bool]  # whether the caller may read a namespace


class RecordReader:
    """Reads records by digest. A record exists if the catalog names it for a document or a past version."""

    def __init__(
        self,
        stores: Stores,
        background: Background,
        pools: Pools,
        metrics: BankMetrics,
        repair: Callable[[str], Awaitable[bool]],
    ) -> None:
        """``repair`` makes a damaged record sound again and says whether it could."""
        self._catalog = stores.catalog
        self._blobs = stores.blobs
        self._cache = stores.cache
        self._background = background
        self._pool = pools.reads
        self._blob_pool = pools.blob_reads
        self._metrics = metrics
        self._repair = repair

    async def check(self, digests: Sequence[str], may_read: MayRead | None = None) -> set[str]:
        """The readable namespaces in which a document or a past version has one of the digests. NotFoundError for the
        first digest without one."""
        known = await in_thread(self._pool, self._known, digests, may_read)
        for digest in digests:
            if digest not in known:
                raise _not_found(digest)
        return set().union(*known.values())

    async def read(self, digests: Sequence[str], may_read: MayRead | None = None) -> dict[str, bytes]:
        """digest → record for all of ``digests``. NotFoundError; DataLossError names a record that is gone or
        corrupt."""
        wanted = list(dict.fromkeys(digests))
        await self.check(wanted, may_read)
        with span("cache.get", num_gradients=len(wanted)) as current:
            records = await self._cache.get(wanted)
            current.set_attribute("num_hits", len(records))
        missing = [digest for digest in wanted if digest not in records]
        if missing:
            with span("blobs.get", num_gradients=len(missing)):
                read = await asyncio.gather(*(self._read(digest, may_read) for digest in missing))
            fresh = dict(zip(missing, read, strict=True))
            self._background.run(self._fill_cache(fresh))
            records.update(fresh)
        return records

    async def _fill_cache(self, records: dict[str, bytes]) -> None:
        await self._cache.put(records)
        # The last document may have been deleted between the read and the put. Then its removal from the cache came
        # before the put, and must be repeated.
        known = await in_thread(self._pool, self._known, list(records), None)
        if gone := records.keys() - known:
            await self._cache.remove(list(gone))

    async def _read(self, digest: str, may_read: MayRead | None) -> bytes:
        try:
            return await in_thread(self._blob_pool, self._read_blob, digest, may_read)
        except DataLossError:
            if not await self._repair(digest):
                raise
        return await in_thread(self._blob_pool, self._read_blob, digest, may_read)

    def _read_blob(self, digest: str, may_read: MayRead | None) -> bytes:
        try:
            return self._blobs.get(digest)
        except DataLossError:
            if digest not in self._known([digest], may_read):  # the document was deleted after the check
                raise _not_found(digest) from None
            self._metrics.lost()
            raise

    def _known(self, digests: Sequence[str], may_read: MayRead | None) -> dict[str, set[str]]:
        """digest → the namespaces in which the caller may read it. Digests without such a namespace are left out."""
        with self._catalog.view() as view:
            found = view.gradient_namespaces(digests)
        if may_read is None:
            return found
        readable = {digest: set(filter(may_read, namespaces)) for digest, namespaces in found.items()}
        return {digest: namespaces for digest, namespaces in readable.items() if namespaces}


def _not_found(digest: str) -> NotFoundError:
    return NotFoundError(
        f"gradient {digest} belongs to no document now; query again for current digests, by a newest query where the "
        "bank reads a replica",
        kind="gradient",
        name=digest,
    )
