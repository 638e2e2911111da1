"""Uploads files and folders to a bank, for `regrad ingest`.

It can skip documents that the bank refuses. At the end it deletes what the files held before and no longer hold.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bank_service.errors import BankError, InvalidArgumentError, VersionConflictError
from regrad_vllm.client.corpus import BadInput, CorpusDocument, CorpusFile, read_corpus
from regrad_vllm.client.leftovers import Held, Leftovers, remove_leftovers
from regrad_vllm.client.values import OUTCOMES, Receipt
from regrad_vllm.data.token_counts import CountTokens, count_tokens

if TYPE_CHECKING:
    from regrad_vllm.client.bank import Bank


@dataclass(frozen=True, slots=True)
class Refusal:
    """A document that the bank refused."""

    place: str
    error: BankError


@dataclass(frozen=True, slots=True)
class UploadOutcome:
    """The outcome of an upload."""

    counts: Counter[str]  # documents by outcome, and the count "truncated"
    refused: tuple[Refusal, ...]
    sequence: int  # of the last change; 0 without any answer
    left: Leftovers
    unusable: tuple[BadInput, ...]  # of the files, except input that was known to be unusable

    def summary(self) -> str:
        parts = [f"{self.counts[name]:,} {name}" for name in OUTCOMES]
        if self.left.num_removed:
            parts.append(f"{self.left.num_removed:,} removed that their files no longer hold")
        if self.counts["truncated"]:
            parts.append(truncated_note(self.counts["truncated"]))
        if self.refused:
            parts.append(f"{len(self.refused):,} refused")
        return ", ".join(parts)


def truncated_note(number: int) -> str:
    """The part of a summary about documents that are longer than the learner reads."""
    return f"{number:,} longer than the learner reads (the rest is not in the gradient)"


class UploadError(RuntimeError):
    """An upload that ended early. ``place`` is the place of the document at fault, or empty."""

    def __init__(self, error: BankError, place: str, num_stored: int) -> None:
        self.error = error
        self.place = place
        self.num_stored = num_stored
        super().__init__(self.told(error.message))

    def told(self, reason: str) -> str:
        """One line about the failure, with the caller's wording of the reason."""
        where = f"{self.place}: " if self.place else ""
        return f"{where}{reason} ({self.num_stored:,} documents before it are in)"


def upload(
    bank: Bank,
    files: Sequence[CorpusFile],
    *,
    namespace: str,
    in_flight: int = 64,
    skip_bad: bool = False,
    delete_missing: bool = False,
    bad: Sequence[BadInput] = (),
    progress: Callable[[], object] = lambda: None,
    count: CountTokens = count_tokens,
) -> UploadOutcome:
    """Streams the files' documents to the bank, with at most ``in_flight`` unanswered documents.

    skip_bad: skips documents that the bank refuses. delete_missing: see ``remove_leftovers``. bad: input that is known
    to be unusable, such as the paths of ``find_files``. progress: called after each document. count: measures the
    passages of texts. UploadError if the stream ends early, BankError if a deletion fails.
    """
    held = Held(files, bad)
    documents = held.noting(read_corpus(files, count))
    counts: Counter[str] = Counter()
    refused: list[Refusal] = []
    sequence = 0
    for document, answer in store(bank, documents, namespace=namespace, in_flight=in_flight, skip_bad=skip_bad):
        if isinstance(answer, Receipt):
            counts[answer.outcome] += 1
            counts["truncated"] += answer.truncated
            sequence = max(sequence, answer.sequence)
        else:
            refused.append(Refusal(document.place, answer))
        progress()
    left = remove_leftovers(bank, namespace, held, delete_missing=delete_missing)
    known = {item.place for item in bad}
    unusable = tuple(item for item in held.unusable if item.place not in known)
    return UploadOutcome(counts, tuple(refused), max(sequence, left.sequence), left, unusable)


def store(
    bank: Bank,
    documents: Iterable[CorpusDocument],
    *,
    namespace: str,
    in_flight: int = 64,
    skip_bad: bool = False,
) -> Iterator[tuple[CorpusDocument, Receipt | BankError]]:
    """Streams documents to the bank while you iterate: each document with its receipt, in order.

    skip_bad: a document that the bank refuses comes with its error, and the others go on. Otherwise, and if the stream
    ends early, UploadError.
    """
    feed = _Feed(documents)
    num_stored = 0
    while not feed.at_end:
        try:
            for receipt in bank.ingest(feed.documents(), namespace=namespace, in_flight=in_flight):
                num_stored += 1
                yield feed.answered(), receipt
        except BankError as error:
            document = feed.rewind()
            own_fault = document is not None and isinstance(error, InvalidArgumentError | VersionConflictError)
            if document is None or not (skip_bad and own_fault):
                place = document.place if document is not None and own_fault else ""
                raise UploadError(error, place, num_stored) from error
            yield document, error


class _Feed:
    """Keeps track of the documents: not sent, sent, answered."""

    def __init__(self, documents: Iterable[CorpusDocument]) -> None:
        self._documents = iter(documents)
        self._again: deque[CorpusDocument] = deque()  # sent on a failed stream, to be sent again
        self._sent: deque[CorpusDocument] = deque()
        self.at_end = False

    def documents(self) -> Iterator[CorpusDocument]:
        """The documents for one stream."""
        while document := self._again.popleft() if self._again else next(self._documents, None):
            self._sent.append(document)
            yield document
        self.at_end = True

    def answered(self) -> CorpusDocument:
        """The oldest unanswered document, which is in the bank now."""
        return self._sent.popleft()

    def rewind(self) -> CorpusDocument | None:
        """After a failed stream: returns the oldest unanswered document. The next stream begins with the others."""
        failed = self._sent.popleft() if self._sent else None
        self._again.extendleft(reversed(self._sent))
        self._sent.clear()
        self.at_end = False
        return failed
