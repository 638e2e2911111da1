"""Queries as_of beside the others: what they take from them, and what is left of one that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from bank_service.catalog.entries import Candidate
from bank_service.errors import OverloadedError
from bank_service.records.stores import NUM_IO_THREADS
from bank_service.search import past, queries
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.documents import Query, QueryResult
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import FloatArray

NUM_BATCHES = 20  # of the past versions, one in each
ASKED = pb.QueryRequest(text="a text", top_k=64, as_of=NUM_BATCHES)


class Gate:
    """Holds queries as_of up between two batches, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.num_batches = self.num_waiting = 0
        real, real_thread = past._merged, queries.stoppable_in_thread

        def merged(
            query: Query, vector: FloatArray, best: Iterable[Candidate], more: Iterable[Candidate]
        ) -> list[Candidate]:
            self.num_batches += 1
            self.reached.set()
            assert self.opened.wait(60)
            return real(query, vector, best, more)

        async def counted(pool: Executor, function: Callable[[Callable[[], None]], QueryResult]) -> QueryResult:
            self.num_waiting += 1
            try:
                return await real_thread(pool, function)
            finally:
                self.num_waiting -= 1

        monkeypatch.setattr(past, "_merged", merged)
        monkeypatch.setattr(queries, "stoppable_in_thread", counted)
        monkeypatch.setattr(past, "BATCH", 1)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.opened.clear()
        self.reached.clear()
        self.num_batches = 0
        try:
            yield
        finally:
            self.opened.set()  # whatever happened: the bank waits for its threads when it stops

    async def reach(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 60)


@pytest.mark.asyncio
async def test_past_queries_hold_no_others_up_and_stop_when_nobody_waits(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BankConfig(data_dir=data_dir, history_seconds=3600)
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        for text in ("a text", "another text"):
            await client.ingest(*({"id": f"d{number}", "text": f"{text} {number}"} for number in range(NUM_BATCHES)))
        gate = Gate(monkeypatch)
        query = client.stub.Query
        # As many as would take all threads, were they the others' threads, by call and by batch.
        batch = pb.BatchQueryRequest(queries=[ASKED] * 4)
        with gate.closed():
            calls = [query(ASKED) for _ in range(2 * NUM_IO_THREADS)]
            batches = [client.stub.BatchQuery(batch) for _ in range(2)]
            await gate.reach()
            for _ in range(3):
                for asked in (pb.QueryRequest(text="a text", top_k=1), pb.QueryRequest(document_ids=["d0"])):
                    (hit,) = (await query(asked, timeout=60)).hits
                    assert hit.version == 2
                await client.put("new", "goes in, too")
            assert gate.num_batches == 1, "one at a time, which waits still"
        answers = await asyncio.gather(*calls)
        for several in await asyncio.gather(*batches):
            answers += several.responses
        then = [1] * NUM_BATCHES
        for answer in answers:
            assert [hit.version for hit in answer.hits] == then
        assert gate.num_batches == len(answers) * NUM_BATCHES

        # That their callers cancel, or whose deadline passes: one on its way, and those that wait behind it.
        for way in ("cancel", "deadline"):
            with gate.closed():
                timeout = 5 if way == "deadline" else None
                calls = [query(ASKED, timeout=timeout) for _ in range(3)]
                await gate.reach()
                if way == "cancel":
                    for call in calls:
                        call.cancel()
                for call in calls:
                    with pytest.raises((grpc.RpcError, asyncio.CancelledError)):
                        await call
                await _none_waiting(gate)
            assert [hit.version for hit in (await query(ASKED)).hits] == then, "the next in the same thread"
            assert gate.num_batches == 1 + NUM_BATCHES, way


@pytest.mark.asyncio
async def test_past_queries_beyond_a_number_are_refused_and_take_no_place_from_others(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BankConfig(data_dir=data_dir, history_seconds=3600, max_queries=8)
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        for text in ("a text", "another text"):
            await client.ingest({"id": "a", "text": text})
        gate, past_query = Gate(monkeypatch), {"text": "a text", "top_k": 1, "as_of": 1}
        with gate.closed():
            calls = [asyncio.create_task(client.query(**past_query)) for _ in range(2)]
            while gate.num_waiting < 2:
                await asyncio.sleep(0.02)
            error = await client.refused(client.query(**past_query), OverloadedError)
            assert error.limit == "max_past_queries" and error.retry_after_ms == 1000
            assert (await client.query(text="a text", top_k=1)).hits[0].version == 2
        for call in calls:
            assert (await call).hits[0].version == 1
        assert (await client.query(**past_query)).hits[0].version == 1, "there is room again"


async def _none_waiting(gate: Gate) -> None:
    """Returns when nobody in the bank waits for an answer any more; the test's own limit ends it."""
    while gate.num_waiting:
        await asyncio.sleep(0.02)
