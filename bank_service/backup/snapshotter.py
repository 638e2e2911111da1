"""Snapshots of a running bank. The bank goes on with its writes and deletions meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import Executor
from contextlib import aclosing

from bank_service.backup.snapshot import Progress, SnapshotWriter, remove_leftovers
from bank_service.backup.target import check_target
from bank_service.errors import DataLossError, InvalidArgumentError, SnapshotError, UnavailableError
from bank_service.records.stores import Stores
from bank_service.runtime.threads import ended_in_thread
from bank_service.values.config import BankConfig


class Snapshotter:
    """Writes one snapshot at a time. It holds all gradients: deleted ones stay on disk until the snapshot ends."""

    def __init__(
        self,
        config: BankConfig,
        stores: Stores,
        pool: Executor,
        repair: Callable[[str], Awaitable[bool]],
        discard: Callable[[Iterable[str]], Awaitable[None]],
    ) -> None:
        """``repair`` makes a damaged gradient sound and says whether it could. ``discard`` removes gradients that no
        document names."""
        self._config = config
        self._blobs = stores.blobs
        self._pool = pool
        self._repair = repair
        self._discard = discard
        self._lock = asyncio.Lock()
        remove_leftovers(config.data_dir)

    async def create(self, target: str) -> AsyncGenerator[Progress, None]:
        """Writes a snapshot and reports its progress. The last report has the manifest.

        InvalidArgumentError for a target that is not allowed or holds other files. UnavailableError where another
        snapshot is under way, or where the target fails. DataLossError where a gradient is lost.
        """
        if self._config.catalog is not None:
            raise InvalidArgumentError(
                "a bank with its catalog in PostgreSQL takes no snapshots; stop it, then back up the database with "
                "pg_dump and the folder or the object store with a copy",
                field="target",
            )
        check_target(self._config, target)
        if self._lock.locked():
            raise UnavailableError("a snapshot is under way; try again when it has ended")
        async with self._lock:
            try:
                with self._blobs.hold_all():
                    async with aclosing(self._write(target)) as steps:
                        async for progress in steps:
                            yield progress
            except SnapshotError as error:
                raise InvalidArgumentError(str(error), field="target") from error
            except OSError as error:
                raise UnavailableError(f"the snapshot's target must be writable, got {error}") from error
            finally:
                await self._discard(self._blobs.take_spared())

    async def stop(self) -> None:
        """Returns when the snapshot under way has ended. The caller sees that no other one begins."""
        async with self._lock:
            pass

    async def _write(self, target: str) -> AsyncGenerator[Progress, None]:
        data_dir = self._config.data_dir
        writer = await ended_in_thread(self._pool, SnapshotWriter, data_dir, self._blobs, target)
        try:
            for digests in writer.batches():
                yield await self._copy(writer, digests)
            yield await ended_in_thread(self._pool, writer.finish)
        finally:
            await ended_in_thread(self._pool, writer.close)

    async def _copy(self, writer: SnapshotWriter, digests: list[str]) -> Progress:
        repaired: set[str] = set()
        while True:
            try:
                return await ended_in_thread(self._pool, writer.copy, digests)
            except DataLossError as error:
                # Repair each gradient only once. A repair may give the document a new gradient that is not in this
                # snapshot's catalog. A second repair would not bring the old one back.
                if error.digest in repaired or not await self._repair(error.digest):
                    raise
                repaired.add(error.digest)
