from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import pytest_asyncio

from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder, default_embedder
from benchmarks.servers.object_servers import ObjectServer, moto, seaweed
from benchmarks.servers.postgres_server import PostgresServer
from tests.bank.postgres_server import started
from tests.bank.weather import Weather, weathered


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return default_embedder()


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A PostgreSQL that no other test file uses, so its tests may stop it."""
    server = started()
    yield server
    server.remove()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "bank"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest_asyncio.fixture
async def server(data_dir: Path, embedder: Embedder) -> AsyncIterator[BankServer]:
    async with BankServer(BankConfig(data_dir=data_dir), HashEncoder(), embedder) as running:
        yield running


@pytest_asyncio.fixture
async def client(server: BankServer) -> AsyncIterator[Client]:
    """A client of a bank for this test alone."""
    async with Client(server.address.target) as connected:
        yield connected


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_client(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> AsyncIterator[Client]:
    """A client of one bank for a whole module. Its tests must work beside each other's documents."""
    config = BankConfig(data_dir=tmp_path_factory.mktemp("shared"))
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as connected:
        yield connected


@pytest.fixture
def redis_server() -> Iterator[str]:
    """URL of a redis-server as Debian packages it."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with tempfile.TemporaryDirectory(prefix="rg-") as folder:  # short: a socket's path has at most 107 bytes
        path = Path(folder, "s.sock")
        options = ["--port", "0", "--unixsocket", str(path), "--dir", folder, "--save", "", "--maxmemory", "64mb"]
        process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 10
            while not _answers(path):
                assert process.poll() is None and time.monotonic() < deadline, "redis-server did not start"
                time.sleep(0.01)
            yield f"unix://{path}"
        finally:
            process.kill()
            process.wait()


def _answers(path: Path) -> bool:
    """Whether a server listens. Its socket is there a moment before."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    """A store that speaks S3, with the bucket ``bucket``. Tests share it, each with a prefix of its own."""
    with moto() as server:
        urllib.request.urlopen(urllib.request.Request(f"{server.endpoint}/bucket", method="PUT"), timeout=30).close()
        yield server


@pytest.fixture
def objects_url(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty object store. This process can reach it."""
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def seaweed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A store on disk that compares keys."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def seaweed_url(seaweed_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty object store on ``seaweed_server``. This process can reach it."""
    for name, value in seaweed_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def weather(object_server: ObjectServer, objects_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Weather]:
    """What happens to requests to ``objects_url``."""
    with weathered(object_server) as (proxy, weather):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield weather
