"""A bank with an object store, of which one or the other is killed while documents are written."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bank_service.blobs.blob_store import name_of
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.errors import InternalError, UnavailableError
from bank_service.service.preflight import check_startable
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from benchmarks.servers.object_servers import SECRET, seaweed
from tests.bank.bank_process import address_of, start_bank
from tests.bank.records.test_fetch import whole
from tests.bank.test_object_store import bank, forget
from tests.bank.weather import Weather


@pytest.mark.asyncio
async def test_a_bank_that_is_killed_while_it_writes_has_every_acknowledged_gradient(
    data_dir: Path, objects_url: str, weather: Weather, embedder: Embedder
) -> None:
    objects = RemoteObjects.at(objects_url)
    acknowledged: dict[str, str] = {}

    async def write(client: Client, name: str) -> None:
        for number in range(10_000):
            try:
                put = await client.put(f"{name}-{number % 5}", f"{name} says {number}")
            except (UnavailableError, InternalError):
                return
            acknowledged[put.id] = put.gradient_digest

    data_dir.mkdir()
    (data_dir / "objects.json").write_text(json.dumps({"url": objects_url}))
    weather.delay_seconds = 0.02  # so that most kills meet a write on its way
    for kill in range(3):
        process = start_bank(data_dir)
        try:
            address = await address_of(process, data_dir)
            async with Client(address.target) as client:
                writers = [asyncio.create_task(write(client, f"{kill}{name}")) for name in "abcd"]
                while len(acknowledged) < 20 * (kill + 1):
                    await asyncio.sleep(0.01)
                process.kill()
                await asyncio.gather(*writers)
        finally:
            process.kill()
            process.wait()
        (data_dir / "address.json").unlink()
    weather.delay_seconds = 0.0
    config = BankConfig(data_dir=data_dir, objects_grace_seconds=1)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        current = {entry.id: entry.gradient_digest for entry in (await client.list(page_size=1000)).documents}
        assert current.keys() == acknowledged.keys()
        newer = {id for id, digest in acknowledged.items() if current[id] != digest}
        assert len(newer) <= 12, "at most the last write of each writer was committed and not acknowledged"
        wanted = {"bank.json", "sequence.json", *map(name_of, current.values())}
        while set(objects.list()) != wanted:  # the test's own limit ends it
            await asyncio.sleep(0.1)
        await forget(data_dir)
        for start in range(0, len(current), 50):
            await whole(client, list(current.values())[start : start + 50])
        assert (await client.stats()).num_gradients == len(wanted) - 2


@pytest.mark.asyncio
@pytest.mark.only_test_all
async def test_a_real_store_refuses_wrong_keys_and_has_every_acknowledged_gradient_after_it_was_killed(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("store", "second"):
        (tmp_path / name).mkdir()
    acknowledged: dict[str, str] = {}

    async def write(client: Client, name: str) -> None:
        """Until the store fails. Then once more, when it is back."""
        for number in range(10_000):
            try:
                put = await client.put(f"{name}-{number}", f"{name} says {number}")
            except UnavailableError:
                return
            acknowledged[put.id] = put.gradient_digest

    with seaweed(tmp_path / "store") as server:
        for name, value in server.environment(secret="wrong").items():
            monkeypatch.setenv(name, value)
        config = BankConfig(data_dir=data_dir, objects="s3://bucket/prefix")
        with pytest.raises(OSError, match=r"403 Forbidden \(SignatureDoesNotMatch\)") as caught:
            check_startable(config)
        assert "wrong" not in str(caught.value)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        stack = AsyncExitStack()
        client = await stack.enter_async_context(bank(data_dir, "s3://bucket/prefix"))
        writers = [asyncio.create_task(write(client, name)) for name in "abcd"]
        while len(acknowledged) < 100:
            await asyncio.sleep(0.01)
    await asyncio.gather(*writers)
    with seaweed(tmp_path / "store"):
        async with stack:
            await client.put("after", "the store is back")
            await forget(data_dir)
            digests = list(acknowledged.values())
            for start in range(0, len(digests), 50):
                await whole(client, digests[start : start + 50])
            assert (await client.stats()).num_documents == len(acknowledged) + 1
