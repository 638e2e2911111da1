"""The stream of documents: bounded, in order, and what goes wrong in it reaches the caller."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from bank_service.errors import InvalidArgumentError, UnavailableError
from bank_service.wire.generated import bank_pb2, bank_pb2_grpc
from bank_service.wire.shown_sequence import ShownSequence
from regrad_vllm.client import AsyncBank, Bank, Document, Receipt
from regrad_vllm.client.ingest_call import IngestCall
from tests.client.conftest import Call, bank_process

IN_FLIGHT = 4


class Source:
    """Documents that count how many were taken."""

    def __init__(self, name: str, number: int) -> None:
        self._documents = [Document(f"{name}-{n}", f"text {n} of {name}") for n in range(number)]
        self.num_taken = 0

    def __iter__(self) -> Iterator[Document]:
        for document in self._documents:
            self.num_taken += 1
            yield document

    async def each(self) -> AsyncIterator[Document]:
        for document in self:
            await asyncio.sleep(0)
            yield document


def test_no_more_documents_are_taken_ahead_of_their_receipts_than_allowed(address: str) -> None:
    source, most = Source("bounded", 100), 0
    receipts = []
    with Bank(address) as bank:
        for receipt in bank.ingest(source, namespace="bounded", in_flight=IN_FLIGHT):
            receipts.append(receipt.id)
            most = max(most, source.num_taken - len(receipts) + 1)
    assert receipts == [f"bounded-{n}" for n in range(100)]
    assert 1 < most <= IN_FLIGHT


@pytest.mark.asyncio
async def test_the_asynchronous_client_is_as_bounded_with_either_kind_of_source(address: str) -> None:
    async with AsyncBank(address) as bank:
        for name in ("plain", "each"):
            source, most = Source(name, 50), 0
            receipts: list[Receipt] = []
            documents = source if name == "plain" else source.each()
            async for receipt in bank.ingest(documents, namespace="bounded-async", in_flight=IN_FLIGHT):
                receipts.append(receipt)
                most = max(most, source.num_taken - len(receipts) + 1)
            assert [receipt.id for receipt in receipts] == [f"{name}-{n}" for n in range(50)]
            assert 1 < most <= IN_FLIGHT + 1  # one receipt may have arrived that isn't given yet


@pytest.mark.asyncio
async def test_a_refused_document_ends_the_stream_after_the_receipts_of_those_before_it(call: Call) -> None:
    for repeat in range(20):  # an answer may come before, while and after the next document is sent
        documents = [Document(f"d{n}", f"text {n} {repeat}") for n in range(30)]
        documents[7] = Document("d7", " ")
        with pytest.raises(InvalidArgumentError) as caught:
            await call("ingest", documents, namespace="refused", in_flight=1 + repeat)
        assert (caught.value.field, caught.value.index) == ("document.text", 7)
        stored = {entry.id for entry in await call("list", namespace="refused")}
        assert stored == {f"d{n}" for n in range(7)}


def test_receipts_of_the_documents_before_a_refused_one_are_all_given(address: str) -> None:
    with Bank(address) as bank:
        for repeat in range(20):
            documents = [Document(f"d{n}", f"text {n} {repeat}") for n in range(10)] + [Document("bad", " ")] * 30
            receipts = []
            with pytest.raises(InvalidArgumentError):
                for receipt in bank.ingest(documents, namespace="receipts"):
                    receipts.append(receipt.id)
            assert receipts == [f"d{n}" for n in range(10)]


def test_an_error_of_the_source_is_the_callers_and_the_stream_is_left(address: str) -> None:
    def documents() -> Iterator[Document]:
        yield Document("before", "A text.")
        raise KeyError("the source broke")

    with Bank(address) as bank:
        with pytest.raises(KeyError, match="the source broke"):
            list(bank.ingest(documents(), namespace="source", in_flight=1))
        assert list(bank.ingest([])) == []


@pytest.mark.asyncio
async def test_an_iteration_that_is_left_ends_its_call_and_its_threads(address: str) -> None:
    def num_threads() -> int:
        return sum(thread.name.startswith("ingest-") for thread in threading.enumerate())

    source = Source("left", 1000)
    with Bank(address) as bank:
        receipts = bank.ingest(source, namespace="left", in_flight=IN_FLIGHT)
        assert [next(receipts).id for _ in range(3)] == ["left-0", "left-1", "left-2"]
        receipts.close()  # type: ignore[attr-defined]  # a generator
        assert source.num_taken <= 3 + IN_FLIGHT
        assert bank.stats().namespaces["left"] >= 3, "the connection goes on"
    async with AsyncBank(address) as bank:
        async for _ in bank.ingest(Source("left-async", 1000), namespace="left", in_flight=IN_FLIGHT):
            break
        assert (await bank.stats()).namespaces["left"] >= 3
    for _ in range(100):
        if not num_threads():
            break
        time.sleep(0.05)
    assert num_threads() == 0


@pytest.mark.asyncio
async def test_an_ingest_that_waits_for_the_bank_takes_no_thread_of_the_loops_pool(tmp_path: Path) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    with bank_process(tmp_path) as (process, address):
        async with AsyncBank(address) as bank:
            await bank.stats()
            process.send_signal(signal.SIGSTOP)
            try:
                receipt = asyncio.ensure_future(anext(bank.ingest([Document("a", "A text.")])))
                await asyncio.sleep(0)  # it waits now
                assert await asyncio.wait_for(asyncio.to_thread(int), 10) == 0 and not receipt.done()
            finally:
                process.send_signal(signal.SIGCONT)
            assert (await receipt).id == "a"


def test_what_has_a_receipt_outlives_a_bank_that_is_killed(tmp_path: Path) -> None:
    receipts: list[Receipt] = []
    with bank_process(tmp_path) as (process, address), Bank(address) as bank, pytest.raises(UnavailableError):
        for receipt in bank.ingest(Source("killed", 5000)):
            receipts.append(receipt)
            if len(receipts) == 30:
                process.kill()
    assert 30 <= len(receipts) < 5000
    with bank_process(tmp_path) as (_, address), Bank(address) as bank:
        stored = {entry.id: entry.gradient_digest for entry in bank.list()}
        assert {receipt.id: receipt.gradient_digest for receipt in receipts}.items() <= stored.items()
        again = list(bank.ingest(Source("killed", 40)))
        assert [receipt.outcome for receipt in again[:30]] == ["unchanged"] * 30


@pytest.mark.parametrize("in_flight", [0, -1])
def test_a_stream_must_have_room_for_a_document(address: str, in_flight: int) -> None:
    with Bank(address) as bank, pytest.raises(ValueError, match="in_flight must be at least 1"):
        list(bank.ingest([], in_flight=in_flight))


class LaterBank(bank_pb2_grpc.BankServiceServicer):
    """A bank of a later version: it has an outcome more."""

    def IngestDocuments(self, request_iterator: Iterator[Any], context: object) -> Iterator[Any]:
        for _ in request_iterator:
            yield bank_pb2.IngestDocumentsResponse(id="a", outcome=17)  # type: ignore[arg-type]


@pytest.mark.timeout(30)
def test_an_answer_that_this_client_does_not_know_is_an_error_and_not_waited_for() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    bank_pb2_grpc.add_BankServiceServicer_to_server(LaterBank(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Bank(f"127.0.0.1:{port}") as bank, pytest.raises(ValueError, match="17"):
            list(bank.ingest([Document("a", "A text.")]))
    finally:
        server.stop(None).wait()


@pytest.mark.timeout(30)
def test_an_error_of_the_reading_thread_is_the_callers_and_not_waited_for() -> None:
    def method(documents: object, metadata: object) -> Iterator[Any]:
        yield bank_pb2.IngestDocumentsResponse(id="a", outcome=1)  # type: ignore[arg-type]
        raise KeyError("gRPC broke")

    call = IngestCall(method, IN_FLIGHT, (), ShownSequence())
    call.send([])
    receipt = call.receive()
    assert receipt is not None and receipt.id == "a"
    with pytest.raises(KeyError, match="gRPC broke"):
        call.receive()


@pytest.mark.asyncio
async def test_an_answer_comes_while_the_next_document_is_awaited(address: str) -> None:
    answered = asyncio.Event()

    async def documents() -> AsyncIterator[Document]:
        yield Document("a", "A text.")
        await asyncio.wait_for(answered.wait(), 20)
        yield Document("b", "B text.")

    ids = []
    async with AsyncBank(address) as bank:
        async for receipt in bank.ingest(documents(), namespace="awaited"):
            ids.append(receipt.id)
            answered.set()
    assert ids == ["a", "b"]
