"""Snapshots of a running bank: it goes on writing and deleting meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path, PurePosixPath
from typing import ParamSpec, TypeVar

from bank_service.backup.snapshot import Progress, SnapshotWriter, remove_leftovers
from bank_service.errors import DataLossError, InvalidArgumentError, SnapshotError, UnavailableError
from bank_service.records.stores import Stores
from bank_service.runtime.threads import in_thread
from bank_service.values.config import BankConfig

P = ParamSpec("P")
T = TypeVar("T")


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
        remove_leftovers(config.data_dir)

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

    async def stop(self) -> None:
        """Returns when the one under way has ended, as it does with its call. No other may begin."""
        async with self._turn:
            pass

    async def _write(self, target: str) -> AsyncGenerator[Progress, None]:
        data_dir = self._config.data_dir
        writer = await self._finished(SnapshotWriter, data_dir, self._blobs, target)
        try:
            for digests in writer.batches():
                yield await self._copy(writer, digests)
            yield await self._finished(writer.finish)
        finally:
            await self._finished(writer.close)

    async def _copy(self, writer: SnapshotWriter, digests: list[str]) -> Progress:
        repaired: set[str] = set()
        while True:
            try:
                return await self._finished(writer.copy, digests)
            except DataLossError as error:
                # Once each: the document may have got another gradient, which this snapshot's catalog does not know.
                if error.digest in repaired or not await self._repair(error.digest):
                    raise
                repaired.add(error.digest)

    async def _finished(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``step`` in a thread, also waited for where the caller goes: the next snapshot must not meet it."""
        task = asyncio.ensure_future(in_thread(self._pool, step, *args, **kwargs))
        try:
            return await asyncio.shield(task)
        finally:
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])


def check_target(config: BankConfig, target: str) -> None:
    """InvalidArgumentError where a caller may not have the bank write there."""
    url = target.removeprefix("file://")
    path = PurePosixPath(url.split("://", 1)[-1])
    is_named = path.is_absolute() and len(path.parts) > 1 if "://" not in url else bool(path.parts)
    if not is_named or ".." in path.parts:
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
