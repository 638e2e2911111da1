"""Snapshots of a running bank: it goes on writing and deleting meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path, PurePosixPath

from bank_service.config import BankConfig
from bank_service.errors import DataLossError, InvalidArgumentError, SnapshotError, UnavailableError
from bank_service.snapshot import Progress, SnapshotWriter
from bank_service.stores import Stores
from bank_service.threads import in_thread


class Snapshotter:
    """One snapshot at a time. Gradients that go meanwhile stay on disk until it ends."""

    def __init__(
        self,
        config: BankConfig,
        stores: Stores,
        pool: Executor,
        repair: Callable[[str], Awaitable[bool]],
        discard: Callable[[Iterable[str]], Awaitable[None]],
    ) -> None:
        """``discard``: removes gradients that no document names."""
        self._config = config
        self._blobs = stores.blobs
        self._pool = pool
        self._repair = repair
        self._discard = discard
        self._turn = asyncio.Lock()

    async def create(self, target: str) -> AsyncGenerator[Progress, None]:
        """Writes a snapshot; the last progress has its manifest.

        InvalidArgumentError for a target that may not be or holds something else; UnavailableError where another
        snapshot is under way or the target fails; DataLossError where a gradient is lost.
        """
        check_target(self._config, target)
        if self._turn.locked():
            raise UnavailableError("a snapshot is under way; try again when it has ended")
        async with self._turn:
            try:
                with self._blobs.keep_all():
                    async for progress in self._write(target):
                        yield progress
            except SnapshotError as error:
                raise InvalidArgumentError(str(error), field="target") from error
            except OSError as error:
                raise UnavailableError(f"the snapshot's target must be writable, got {error}") from error
            finally:
                await self._discard(self._blobs.take_spared())

    async def _write(self, target: str) -> AsyncGenerator[Progress, None]:
        data_dir = self._config.data_dir
        writer = await in_thread(self._pool, SnapshotWriter, data_dir, self._blobs, target)
        try:
            for digests in writer.batches():
                try:
                    yield await in_thread(self._pool, writer.copy, digests)
                except DataLossError as error:
                    if not await self._repair(error.digest):
                        raise
                    yield await in_thread(self._pool, writer.copy, digests)
            yield await in_thread(self._pool, writer.finish)
        finally:
            await in_thread(self._pool, writer.close)


def check_target(config: BankConfig, target: str) -> None:
    """InvalidArgumentError where a caller may not have the bank write there."""
    url = target.removeprefix("file://")
    path = PurePosixPath(url.split("://", 1)[-1])
    if ("://" not in url and not path.is_absolute()) or ".." in path.parts or not path.parts:
        raise InvalidArgumentError(
            f"target must be an absolute folder of the bank's machine or a URL, without .., got {target[:200]!r}",
            field="target",
        )
    root = config.snapshot_root
    if root is None:
        allowed = config.is_loopback
    elif "://" in url:
        allowed = url == root or url.startswith(root.rstrip("/") + "/")
    else:
        allowed = Path(url).resolve().is_relative_to(Path(root.removeprefix("file://")).resolve())
    if not allowed:
        raise InvalidArgumentError(
            f"target must lie below the bank's --snapshot-root, {root or 'which it was started without'}, "
            f"got {target[:200]!r}",
            field="target",
        )
