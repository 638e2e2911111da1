"""A bank as a gRPC server: start, health, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import grpc
import prometheus_client
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bank_service.bank import Bank
from bank_service.cache.embedded_redis import EmbeddedRedis
from bank_service.runtime.background import cancelled
from bank_service.runtime.data_dir import BankAddress, DataDir
from bank_service.runtime.metrics import BankMetrics
from bank_service.service.access import Authority
from bank_service.service.admission import Admission
from bank_service.service.health import Health
from bank_service.service.own_redis import own_redis_url
from bank_service.service.servicer import BankServicer
from bank_service.service.tls import server_credentials
from bank_service.service.tokens_file import TokensFile
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder, default_embedder
from bank_service.values.encoder import Encoder
from bank_service.values.namespace_limits import NamespaceLimits
from bank_service.wire import limits
from bank_service.wire.generated import bank_pb2, bank_pb2_grpc
from bank_service.wire.ports import cannot_listen, target_of
from bank_service.wire.tracing import configure_tracing

__all__ = ["BankAddress", "BankServer", "run_bank", "serve"]

logger = logging.getLogger(__name__)

_SPARE_CALLS = 256  # calls beyond ``max_calls``, for health, reflection and refusals with a reason
SERVICE = bank_pb2.DESCRIPTOR.services_by_name["BankService"].full_name


class BankServer:
    """A running bank: ``async with BankServer(config, encoder) as server: server.address``.

    Start it in the main thread of its process, because the embedded Redis server ends with the thread that started it.
    """

    def __init__(self, config: BankConfig, encoder: Encoder, embedder: Embedder | None = None) -> None:
        """Without an ``embedder``, the bank uses the installed MiniLM."""
        self.config = config
        self._encoder = encoder
        self._embedder = embedder
        self.metrics = BankMetrics()
        self._health = Health()
        self._stack = AsyncExitStack()
        self._address: BankAddress | None = None
        self._tokens: TokensFile | None = None

    @property
    def address(self) -> BankAddress:
        """The address, once the server is started."""
        if self._address is None:
            raise RuntimeError("the bank must be started before it has an address")
        return self._address

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Returns when the bank answers.

        BankInUseError, CollectionMismatchError. RuntimeError if a port is taken or a package is missing.
        """
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        """Tells clients that watch the bank's health, and refuses new calls. Waits ``drain_seconds`` at most for calls
        under way, then closes everything."""
        await self._stack.aclose()
        self._address = None

    async def _start(self) -> None:
        config = self.config
        if not config.is_loopback and config.missing_protection:
            logger.warning(
                "the bank should listen on loopback, got host %s: it has no %s, so whoever reaches its port or its "
                "network may read and change what it holds; let only a private network reach it",
                config.host,
                " or ".join(config.missing_protection),
            )
        self._tokens = None if config.tokens_file is None else TokensFile(config.tokens_file)
        credentials = server_credentials(config)
        data_dir = DataDir(config.data_dir)
        await asyncio.to_thread(data_dir.take)
        self._stack.callback(data_dir.release)
        cache_url = own_redis_url(config)
        if cache_url is None:
            redis = EmbeddedRedis(config.data_dir, config.cache_bytes)
            self._stack.push_async_callback(redis.stop)
            await redis.start()
            cache_url = redis.url
        embedder = self._embedder
        if embedder is None:
            embedder = await asyncio.to_thread(default_embedder)
        bank = await Bank.open(config, self._encoder, embedder, cache_url, self.metrics, self._limits_of)
        self._stack.push_async_callback(bank.close)
        port = await self._listen(bank, credentials)
        self._address = BankAddress(config.host, port, self._serve_metrics())
        following = asyncio.create_task(self._health.follow(("", SERVICE), lambda: bank.is_current))
        self._stack.push_async_callback(cancelled, following)
        data_dir.announce(self._address)
        logger.info("bank of learner %s at %s", self._encoder.spec.fingerprint, self._address.target)

    def _limits_of(self, namespace: str) -> NamespaceLimits:
        defaults = self.config.namespace_limits
        return defaults if self._tokens is None else self._tokens.limits(namespace, defaults)

    async def _listen(self, bank: Bank, credentials: grpc.ServerCredentials | None) -> int:
        config = self.config
        # Above this, gRPC refuses calls before it reads them. Below it, admission refuses with a reason.
        max_calls = config.max_calls + _SPARE_CALLS
        server = grpc.aio.server(options=limits.server_options(), maximum_concurrent_rpcs=max_calls)
        admission = Admission(config, self._limits_of)
        authority = Authority(self._tokens)
        servicer = BankServicer(
            bank, self.metrics, authority, admission, config.ingest_idle_seconds, config.unread_seconds
        )
        bank_pb2_grpc.add_BankServiceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
        target = target_of(config.host, config.port)
        # Health and reflection need no token, because they reveal nothing about documents.
        try:
            port = (
                server.add_insecure_port(target) if credentials is None else server.add_secure_port(target, credentials)
            )
        except RuntimeError as error:
            raise RuntimeError(cannot_listen("the bank", config.host, config.port, "--port")) from error
        await server.start()

        async def drain() -> None:
            await self._health.leave()
            await server.stop(self.config.drain_seconds)

        self._stack.push_async_callback(drain)
        return int(port)

    def _serve_metrics(self) -> int | None:
        host, port = self.config.host, self.config.metrics_port
        if port is None:
            return None
        try:
            server, thread = prometheus_client.start_http_server(port, host, self.metrics.registry)
        except OSError as error:
            raise RuntimeError(cannot_listen("the bank", host, port, "--metrics-port", error)) from error
        self._stack.callback(thread.join)
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)
        return int(server.server_port)


async def serve(
    config: BankConfig,
    encoder: Encoder,
    *,
    ready: Callable[[BankAddress], None] | None = None,
    embedder: Embedder | None = None,
) -> None:
    """Runs a bank until SIGTERM or SIGINT, then drains it. Calls ``ready`` when the bank answers."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        async with BankServer(config, encoder, embedder) as server:
            if ready is not None:
                ready(server.address)
            await stopping.wait()
            logger.info("the bank is stopping")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def run_bank(config: BankConfig, encoder: Encoder, *, ready: Callable[[BankAddress], None] | None = None) -> None:
    """Blocking entry point of a bank process. It configures tracing, then serves until a signal."""
    stop_tracing = configure_tracing("regrad-bank")
    try:
        asyncio.run(serve(config, encoder, ready=ready))
    finally:
        stop_tracing()
