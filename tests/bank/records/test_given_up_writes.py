"""A write that its client has given up, and the next one of the same document."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from bank_service.blobs.blob_store import BlobStore
from bank_service.runtime import background
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import spec_of
from bank_service.wire.record import record_digest
from benchmarks.bank_soak.ledger import SeededContent


@pytest.mark.asyncio
async def test_a_write_given_up_does_not_replace_one_that_was_acknowledged_after_it(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, kept = SeededContent(1), SeededContent(2)
    slow = record_digest(given_up.record(spec_of()))
    reached, may_go_on = threading.Event(), threading.Event()
    put = BlobStore.put

    def put_slowly(store: BlobStore, digest: str, record: bytes) -> None:
        if digest == slow:
            reached.set()
            may_go_on.wait(2)
        put(store, digest, record)

    monkeypatch.setattr(BlobStore, "put", put_slowly)
    await client.upload(*SeededContent(0).upload("n", "x", spec_of(), 384))
    write = asyncio.create_task(client.upload(*given_up.upload("n", "x", spec_of(), 384)))
    assert await asyncio.to_thread(reached.wait, 10)
    write.cancel()
    await asyncio.gather(write, return_exceptions=True)
    await asyncio.sleep(0.2)  # the bank has learned of it
    (acknowledged,) = await client.upload(*kept.upload("n", "x", spec_of(), 384))
    may_go_on.set()
    await asyncio.sleep(0.5)
    found = await client.get("x", "n")
    assert (found.document.text, found.version) == (kept.text, acknowledged.version)


@pytest.mark.asyncio
async def test_a_task_that_a_library_kept_from_its_end_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As asyncio.wait_for of Python 3.11 does where what it waits for is done when the cancellation comes."""
    monkeypatch.setattr(background, "CANCEL_SECONDS", 0.05)
    asleep = asyncio.Event()

    async def work() -> None:
        asleep.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        while True:
            await asyncio.sleep(3600)

    task = asyncio.create_task(work())
    await asleep.wait()
    async with asyncio.timeout(10):
        await background.cancelled(task)
    assert task.cancelled()
