"""Documents of a corpus → bank: one stream, so many documents ahead of the answers and no more."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrad_vllm.cli.connection import connect, describe_failure
from regrad_vllm.cli.console import CommandError
from regrad_vllm.cli.corpus import BadInput, CorpusDocument, CorpusFile, read_corpus

if TYPE_CHECKING:
    from bank_service.wire.errors import BankError

_OUTCOMES = ("CREATED", "UPDATED", "UNCHANGED")


@dataclass(frozen=True, slots=True)
class UploadOutcome:
    """What became of a corpus."""

    counts: Counter[str]  # by outcome, and "truncated", "removed"
    refused: tuple[BadInput, ...]  # by the bank
    sequence: int  # the highest that an answer had: there all of them are in; 0: nothing was answered

    def summary(self) -> str:
        parts = [f"{self.counts[name]:,} {name.lower()}" for name in _OUTCOMES]
        if self.counts["removed"]:
            parts.append(f"{self.counts['removed']:,} removed that their files no longer hold")
        if self.counts["truncated"]:
            parts.append(
                f"{self.counts['truncated']:,} longer than the learner reads (the rest is not in the gradient)"
            )
        if self.refused:
            parts.append(f"{len(self.refused):,} refused")
        return ", ".join(parts)


def upload(
    bank: str,
    namespace: str,
    files: Sequence[CorpusFile],
    num_documents: int,
    *,
    in_flight: int = 64,
    skip_bad: bool = False,
) -> UploadOutcome:
    """Streams the files' documents to the bank, at most ``in_flight`` ahead of its answers, with a progress bar.

    A document that the bank refuses is a CommandError that names it and says how many went in before it or, with
    ``skip_bad``, is passed over. Documents that a shortened file no longer holds are deleted at the end.
    """
    from tqdm import tqdm

    from bank_service.wire.errors import InvalidArgumentError, VersionConflictError

    counts: Counter[str] = Counter()
    refused: list[BadInput] = []
    feed = _Feed(item for item in read_corpus(files) if isinstance(item, CorpusDocument))
    with connect(bank) as stub, tqdm(total=num_documents, unit="doc", desc="ingest") as bar:
        while error := _stream(stub, namespace, feed, in_flight, counts, bar):
            document = feed.rewind()
            own_fault = isinstance(error, InvalidArgumentError | VersionConflictError)
            if document is None or not (skip_bad and own_fault):
                done = sum(counts[name] for name in _OUTCOMES)
                place = f"{document.place}: " if document and own_fault else ""
                raise CommandError(f"{place}{describe_failure(bank, error)} ({done:,} documents before it are in)")
            refused.append(BadInput(document.place, describe_failure(bank, error)))
            bar.update()
        counts["removed"] = sum(_remove_rest(stub, namespace, file.id, feed) for file in files)
    return UploadOutcome(counts, tuple(refused), feed.sequence)


class _Feed:
    """Documents on their way: not sent, sent, answered. gRPC's thread takes, ours answers."""

    def __init__(self, documents: Iterable[CorpusDocument]) -> None:
        self._documents = iter(documents)
        self._again: deque[CorpusDocument] = deque()  # sent on a stream that failed
        self._sent: deque[CorpusDocument] = deque()
        self._lock = threading.Lock()
        self.sequence = 0  # the highest of the answers
        self.stream = 0  # the number of the stream that may take
        self.highest: dict[str, int] = {}  # file → its last passage's number, 0 where it is one whole document

    def take(self, stream: int) -> CorpusDocument | None:
        """The next to send; None at the end, or where ``stream`` was given up."""
        with self._lock:
            if stream != self.stream:
                return None
            document = self._again.popleft() if self._again else next(self._documents, None)
            if document is not None:
                self._sent.append(document)
            return document

    def answered(self, sequence: int) -> None:
        """The oldest one sent is in the bank, by the change of that number."""
        self.sequence = max(self.sequence, sequence)
        with self._lock:
            document = self._sent.popleft()
        base, _, number = document.id.rpartition("#")
        if base and number.isdecimal():
            self.highest[base] = max(self.highest.get(base, 0), int(number))
        else:
            self.highest.setdefault(document.id, 0)

    def rewind(self) -> CorpusDocument | None:
        """Gives the stream up. What was sent and not answered goes first on the next, without the first: returned."""
        with self._lock:
            self.stream += 1
            failed = self._sent.popleft() if self._sent else None
            self._again.extendleft(reversed(self._sent))
            self._sent.clear()
            return failed


def _stream(stub: Any, namespace: str, feed: _Feed, in_flight: int, counts: Counter[str], bar: Any) -> BankError | None:
    """Sends what the feed holds. Returns the error that ended it early, None where all were answered."""
    import grpc

    from bank_service.wire.errors import from_rpc_error
    from bank_service.wire.generated import bank_pb2

    room = threading.Semaphore(in_flight)
    number = feed.stream

    def requests() -> Iterator[bank_pb2.IngestDocumentsRequest]:
        room.acquire()
        while document := feed.take(number):
            yield bank_pb2.IngestDocumentsRequest(
                document=bank_pb2.Document(
                    namespace=namespace,
                    id=document.id,
                    title=document.title,
                    text=document.text,
                    metadata=dict(document.metadata),
                )
            )
            room.acquire()

    call = stub.IngestDocuments(requests())
    try:
        for answer in call:
            feed.answered(answer.sequence)
            counts[bank_pb2.IngestDocumentsResponse.Outcome.Name(answer.outcome)] += 1
            counts["truncated"] += answer.truncated
            bar.update()
            room.release()
    except grpc.RpcError as error:
        return from_rpc_error(error)
    finally:
        call.cancel()
        room.release()  # gRPC's thread may be waiting for it
    return None


def _remove_rest(stub: Any, namespace: str, file_id: str, feed: _Feed) -> int:
    """Deletes the passages that the file had at an earlier ingest and has no more; returns how many."""
    if file_id not in feed.highest:
        return 0
    last = feed.highest[file_id]
    removed = 0
    if last:
        removed += _delete(stub, namespace, file_id, feed)
    while _delete(stub, namespace, f"{file_id}#{last + 1}", feed):
        removed += 1
        last += 1
    return removed


def _delete(stub: Any, namespace: str, document_id: str, feed: _Feed) -> bool:
    """False where there is no such document."""
    import grpc

    from bank_service.wire.generated import bank_pb2

    try:
        answer = stub.DeleteDocument(bank_pb2.DeleteDocumentRequest(namespace=namespace, id=document_id))
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return False
        raise
    feed.sequence = max(feed.sequence, answer.sequence)
    return True
