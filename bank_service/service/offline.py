"""Opens a bank without its server, for work on the folder of a stopped bank."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from bank_service.bank import Bank
from bank_service.cache.embedded_redis import EmbeddedRedis
from bank_service.catalog.factory import check_readable
from bank_service.errors import CollectionMismatchError
from bank_service.runtime.data_dir import DataDir
from bank_service.runtime.metrics import BankMetrics
from bank_service.runtime.ownership import Ownership
from bank_service.upkeep.scrub import ScrubCounts
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder, default_embedder
from bank_service.values.encoder import Encoder


@asynccontextmanager
async def opened(config: BankConfig, encoder: Encoder, embedder: Embedder | None = None) -> AsyncIterator[Bank]:
    """Opens the bank of ``config.data_dir``, which must exist. FileNotFoundError; the errors of ``BankServer.start``.

    Expired past versions stay. Only a running server drops them.
    """
    _check_folder(config)
    async with AsyncExitStack() as stack:
        owner: Ownership = DataDir(config.data_dir)
        await asyncio.to_thread(owner.take)
        stack.callback(owner.release)
        redis = EmbeddedRedis(config.data_dir, config.cache_bytes)
        stack.push_async_callback(redis.stop)
        await redis.start()
        if embedder is None:
            embedder = await asyncio.to_thread(default_embedder)
        bank = await Bank.open(config, encoder, embedder, redis.url, BankMetrics(), expires_history=False)
        stack.push_async_callback(bank.close)
        yield bank


async def scrub(config: BankConfig, encoder: Encoder, embedder: Embedder | None = None) -> ScrubCounts:
    """Verifies every gradient of the bank and repairs those that it can.

    CollectionMismatchError where there is no bank; the errors of ``opened``.
    """
    _check_folder(config)
    if await asyncio.to_thread(check_readable, config.data_dir, config.catalog) is None:
        raise CollectionMismatchError(
            f"{'the catalog' if config.catalog else config.data_dir} must have a bank, it has none; name the bank's "
            "folder with --data-dir, and its catalog with --catalog where it has one in PostgreSQL"
        )
    async with opened(config, encoder, embedder) as bank:
        return await bank.scrub()


def _check_folder(config: BankConfig) -> None:
    if not config.data_dir.is_dir():
        raise FileNotFoundError(f"{config.data_dir} must be the folder of a bank, it does not exist")
