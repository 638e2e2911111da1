"""The stream to the bank: bounded, in order, and nothing lost where a document in the middle is refused.

The real bank refuses little that the corpus reader lets through. So a server of this test plays one that refuses more.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from bank_service.errors import InvalidArgumentError, PermissionDeniedError
from bank_service.wire.errors import to_status
from bank_service.wire.generated import bank_pb2, bank_pb2_grpc
from regrad_vllm.client import Bank
from regrad_vllm.client.corpus import CorpusFile
from regrad_vllm.client.upload import UploadError, UploadOutcome, upload


class _Picky(bank_pb2_grpc.BankServiceServicer):  # type: ignore[misc]  # generated code has no types
    """Stores ids, refuses those that start with "bad", and notes how far ahead of its answers the client was."""

    def __init__(self, hold: int) -> None:
        self.stored: list[str] = []
        self.most_ahead = 0
        self.refuses_reads = False
        self._hold = hold  # answers only when so many wait, or a moment passed

    def IngestDocuments(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        waiting: list[str] = []
        arrived = threading.Condition()
        ended = threading.Event()

        def read() -> None:
            try:
                for request in requests:
                    with arrived:
                        waiting.append(request.document.id)
                        self.most_ahead = max(self.most_ahead, len(waiting))
                        arrived.notify()
            except grpc.RpcError:  # the call ended with a refusal
                pass
            finally:
                ended.set()

        threading.Thread(target=read, daemon=True).start()
        while True:
            with arrived:
                arrived.wait_for(lambda: len(waiting) >= self._hold or ended.is_set(), timeout=0.1)
                if not waiting:
                    if ended.is_set():
                        return
                    continue
                document_id = waiting[0]
                if not document_id.startswith("bad"):
                    waiting.pop(0)
            if document_id.startswith("bad"):
                refusal = InvalidArgumentError(f"{document_id} is bad", field="document.text")
                context.abort_with_status(rpc_status.to_status(to_status(refusal)))
            self.stored.append(document_id)
            outcome = bank_pb2.IngestDocumentsResponse.CREATED
            yield bank_pb2.IngestDocumentsResponse(id=document_id, version=1, outcome=outcome)

    def ListDocuments(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self.refuses_reads:
            refusal = PermissionDeniedError("this token may only write", scope="read", namespace="n")
            context.abort_with_status(rpc_status.to_status(to_status(refusal)))
        entries = [bank_pb2.ListDocumentsResponse.Entry(id=id, version=1) for id in self.stored]
        return bank_pb2.ListDocumentsResponse(documents=entries)  # of all documents, as before there were filters


@pytest.fixture
def picky() -> Iterator[tuple[_Picky, str]]:
    servicer = _Picky(hold=5)
    server = grpc.server(ThreadPoolExecutor(8))
    bank_pb2_grpc.add_BankServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(0).wait()


def _corpus(path: Path, ids: list[str]) -> list[CorpusFile]:
    path.write_text("".join(json.dumps({"id": name, "text": "x"}) + "\n" for name in ids))
    return [CorpusFile(path, path.name, "s")]


def _upload(address: str, files: list[CorpusFile], **flags: Any) -> UploadOutcome:
    with Bank(address) as bank:
        return upload(bank, files, namespace="n", **flags)


def test_documents_arrive_in_order_with_no_more_in_flight_than_allowed(
    picky: tuple[_Picky, str], tmp_path: Path
) -> None:
    servicer, address = picky
    ids = [f"d{n}" for n in range(60)]
    outcome = _upload(address, _corpus(tmp_path / "c.jsonl", ids), in_flight=5)
    assert servicer.stored == ids
    assert outcome.counts["created"] == 60
    assert 1 < servicer.most_ahead <= 5


@pytest.mark.parametrize("bad_places", [[0], [7], [19], [3, 4, 5], [0, 19]])
def test_a_refused_document_is_passed_over_and_no_other_is_lost(
    picky: tuple[_Picky, str], tmp_path: Path, bad_places: list[int]
) -> None:
    servicer, address = picky
    ids = [f"bad{n}" if n in bad_places else f"d{n}" for n in range(20)]
    files = _corpus(tmp_path / "c.jsonl", ids)
    outcome = _upload(address, files, in_flight=6, skip_bad=True)
    assert servicer.stored == [name for name in ids if not name.startswith("bad")]
    assert [item.place for item in outcome.refused] == [f"{tmp_path}/c.jsonl:{n + 1}" for n in bad_places]


def test_without_skipping_the_first_refusal_ends_it_and_says_how_far_it_came(
    picky: tuple[_Picky, str], tmp_path: Path
) -> None:
    servicer, address = picky
    files = _corpus(tmp_path / "c.jsonl", ["d0", "d1", "bad2", "d3"])
    with pytest.raises(UploadError, match=r"c\.jsonl:3: .*bad2 is bad.*\(2 documents before it are in\)"):
        _upload(address, files)
    assert servicer.stored == ["d0", "d1"]


def test_a_bank_that_knows_no_sources_loses_nothing(picky: tuple[_Picky, str], tmp_path: Path) -> None:
    servicer, address = picky
    servicer.stored.append("d1")
    outcome = _upload(address, _corpus(tmp_path / "c.jsonl", ["d0"]), delete_missing=True)
    assert outcome.left.num_removed == 0
    assert "earlier version" in outcome.left.unknown


def test_a_token_that_may_only_write_ingests_and_is_told_what_was_not_looked_for(
    picky: tuple[_Picky, str], tmp_path: Path
) -> None:
    servicer, address = picky
    servicer.refuses_reads = True
    outcome = _upload(address, _corpus(tmp_path / "c.jsonl", ["d0"]), delete_missing=True)
    assert outcome.counts["created"] == 1
    assert outcome.left.unknown == "this token may only write"
