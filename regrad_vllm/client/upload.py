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
            parts.append(
                f"{self.counts['truncated']:,} longer than the learner reads (the rest is not in the gradient)"
            )
        if self.refused:
            parts.append(f"{len(self.refused):,} refused")
        return ", ".join(parts)


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
    feed = _Feed(held.noting(read_corpus(files, count)))
    counts: Counter[str] = Counter()
    refused: list[Refusal] = []
    while not feed.at_end:
        try:
            for receipt in bank.ingest(feed.documents(), namespace=namespace, in_flight=in_flight):
                feed.answered(receipt)
                counts[receipt.outcome] += 1
                counts["truncated"] += receipt.truncated
                progress()
        except BankError as error:
            document = feed.rewind()
            own_fault = document is not None and isinstance(error, InvalidArgumentError | VersionConflictError)
            if document is None or not (skip_bad and own_fault):
                place = document.place if document is not None and own_fault else ""
                raise UploadError(error, place, sum(counts[name] for name in OUTCOMES)) from error
            refused.append(Refusal(document.place, error))
            progress()
    left = remove_leftovers(bank, namespace, held, delete_missing=delete_missing)
    known = {item.place for item in bad}
    unusable = tuple(item for item in held.unusable if item.place not in known)
    return UploadOutcome(counts, tuple(refused), max(feed.sequence, left.sequence), left, unusable)


class _Feed:
    """Keeps track of the documents: not sent, sent, answered."""

    def __init__(self, documents: Iterable[CorpusDocument]) -> None:
        self._documents = iter(documents)
        self._again: deque[CorpusDocument] = deque()  # sent on a failed stream, to be sent again
        self._sent: deque[CorpusDocument] = deque()
        self.at_end = False
        self.sequence = 0  # the highest one in the answers

    def documents(self) -> Iterator[CorpusDocument]:
        """The documents for one stream."""
        while document := self._again.popleft() if self._again else next(self._documents, None):
            self._sent.append(document)
            yield document
        self.at_end = True

    def answered(self, receipt: Receipt) -> None:
        """Notes that the oldest unanswered document is in the bank."""
        self.sequence = max(self.sequence, receipt.sequence)
        self._sent.popleft()

    def rewind(self) -> CorpusDocument | None:
        """After a failed stream: returns the oldest unanswered document. The next stream begins with the others."""
        failed = self._sent.popleft() if self._sent else None
        self._again.extendleft(reversed(self._sent))
        self._sent.clear()
        self.at_end = False
        return failed
