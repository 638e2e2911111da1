"""The contract of a catalog. Every store of a bank's documents follows it.

**Identity.** A namespace and an id name a document. Its ``key`` stays the same, even if it is deleted and stored again.
Every change gets the next ``sequence``, without gaps. A version is named by the sequence of the change that began it.

**Consistency.** Writes happen one after the other, each whole or not at all. A view sees every write whose future had a
result before the view opened. A view stays at one state from its first read on.

**Durability.** A write's future gets its result only when the change survives a crash.

**Threads.** Every method of a ``Catalog`` may be called from any thread at any time. A ``CatalogView`` belongs to one
thread at a time.

**Errors.** Each method names its errors. Every read may also raise CatalogReadError. Every write's future may also
raise UnavailableError, if the store can't be written or is closed, and InternalError for a bug.

An implementation must pass the suite in ``tests/bank/catalog``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Protocol

from bank_service.catalog.entries import (
    Candidate,
    Change,
    DeleteResult,
    Erasure,
    ListEntry,
    Score,
    SentenceVectors,
    Totals,
    Usage,
    VersionText,
)
from bank_service.catalog.next_learner import NextLearnerReads, NextLearnerWrites
from bank_service.catalog.nodes import SharedCatalog
from bank_service.values.documents import Document, Gradient, Hit, PutResult, StoredDocument
from bank_service.values.filters import Condition
from bank_service.wire.record import FloatArray

MAX_KEYS = 500  # the most keys, ids or digests in one read; the docstrings of these reads name this limit


class CatalogView(NextLearnerReads, Protocol):
    """Reads one committed state. Valid only inside the ``with`` block of ``Catalog.view``."""

    # Documents

    def sequence(self) -> int:
        """The sequence of the last change; 0 before the first."""
        ...

    def sequence_of(self, namespaces: Collection[str]) -> int:
        """The sequence of the last change in these namespaces; 0 where there was none."""
        ...

    def check_namespace(self, namespace: str) -> None:
        """NotFoundError for a namespace that never had a document. The default namespace always exists."""
        ...

    def get(self, namespace: str, id: str) -> StoredDocument | None:
        """The document, or None where there is none now."""
        ...

    def page(
        self, namespace: str, after_id: str, size: int, conditions: Sequence[Condition] = (), prefix: str = ""
    ) -> list[ListEntry]:
        """Up to ``size`` documents after ``after_id`` whose ids start with ``prefix`` and that meet all conditions, by
        their ids' UTF-8 bytes."""
        ...

    def after_key(self, key: int, limit: int) -> list[StoredDocument]:
        """Up to ``limit`` documents of all namespaces after a key, in order of key."""
        ...

    def began(self, namespace: str, ids: Sequence[str], as_of: int | None = None) -> dict[str, int]:
        """id → the sequence at which its version began. Takes the version that held at ``as_of``, or the present one.

        Leaves out documents that did not exist then. At most MAX_KEYS ids.
        """
        ...

    def hits(self, scores: dict[int, Score], include_text: bool) -> list[Hit]:
        """A hit for each version in ``scores``, in its order. At most MAX_KEYS versions.

        The keys of ``scores`` are the sequences at which versions began. Versions that are gone are left out.
        """
        ...

    def texts(self, began: Sequence[int]) -> dict[int, VersionText]:
        """The sequence at which a version began → its text. Versions that are gone are left out. At most MAX_KEYS."""
        ...

    # Changes, for stores that follow the catalog

    def changes(self, after_sequence: int, limit: int) -> list[Change]:
        """Up to ``limit`` changes in order of sequence. Each document has only its last change here."""
        ...

    def changes_of(
        self, namespace: str, after_sequence: int, limit: int | None = None, *, alive: bool = False
    ) -> list[Change]:
        """The changes of one namespace, in order of sequence. ``limit`` None: all. ``alive``: leaves out deletions."""
        ...

    # Search

    def candidates(self, keys: Sequence[int]) -> list[Candidate]:
        """The documents among ``keys`` that are not deleted, in any order. At most MAX_KEYS keys."""
        ...

    def matching(
        self, namespace: str, conditions: Sequence[Condition], limit: int | None = None, as_of: int | None = None
    ) -> list[int]:
        """Up to ``limit`` keys of documents that meet all conditions, in order of key.

        ``as_of``: only documents that have not changed since that sequence.
        """
        ...

    def among(self, keys: Sequence[int], conditions: Sequence[Condition], as_of: int | None = None) -> set[int]:
        """The keys among ``keys`` whose documents meet all conditions. ``as_of`` means the same as in ``matching``."""
        ...

    # The past

    def horizon(self, namespace: str) -> int:
        """The oldest sequence at which the namespace's whole content is known."""
        ...

    def past_candidates(
        self, namespace: str, as_of: int, conditions: Sequence[Condition], after: int, limit: int
    ) -> tuple[list[Candidate], int] | None:
        """Reads the next past versions that held at ``as_of``. Versions that still hold today are not among them.

        Reads up to ``limit`` versions that ended after the sequence ``after``, which is ``as_of`` in the first call.
        Returns the versions that meet all conditions, and ``after`` for the next call. None: there are no more.
        """
        ...

    # Gradients

    def gradient_sizes(self, digests: Sequence[str]) -> dict[str, int]:
        """digest → bytes, for the gradients that a document or a past version has, also of the next learner. At most
        MAX_KEYS digests."""
        ...

    def gradients(self, after_digest: str, limit: int) -> dict[str, int]:
        """The next ``limit`` gradients of documents and past versions, in order of digest: digest → bytes. Those of the
        next learner are among them."""
        ...

    def gradient_namespaces(self, digests: Sequence[str]) -> dict[str, set[str]]:
        """digest → the namespaces of its documents and past versions. Knows the gradients of the next learner, too. At
        most MAX_KEYS digests."""
        ...

    def owners(self, digest: str, limit: int) -> list[StoredDocument]:
        """Up to ``limit`` documents that have this gradient."""
        ...

    def past_owners(self, digest: str, limit: int) -> list[StoredDocument]:
        """Up to ``limit`` past versions with this gradient. Their ``sequence`` is the one at which they began."""
        ...

    def is_recoding(self) -> bool:
        """Whether some gradients may still have another codec than the collection."""
        ...

    # Figures

    def usage(self, namespace: str) -> Usage:
        """The counts of a namespace's documents and bytes."""
        ...

    def totals(self, may_see: Callable[[str], bool] | None = None) -> Totals:
        """The totals of all namespaces. ``may_see``: of those that a caller may see, as if there were no others."""
        ...

    # Purges

    def pending_erasures(self, after: int, limit: int) -> list[Erasure]:
        """Up to ``limit`` erasures with a number above ``after``, in order."""
        ...


class WordSearch(Protocol):
    """Finds the best documents by BM25, with k1 = 1.2 and b = 0.75, over title and text.

    ``values.words`` makes the words of documents and queries. The idf of a word is always positive, and close to 0 for
    words in half of the documents or more. An implementation must pass ``tests/bank/search/test_word_search.py``.
    """

    def best(
        self, view: CatalogView, namespace: str, text: str, conditions: Sequence[Condition], count: int
    ) -> dict[int, float]:
        """key → score of up to ``count`` documents that share a word with ``text`` and meet all conditions.

        Best first, ties by id. Only documents of the namespace influence the scores. ``view`` must be a view of this
        catalog.
        """
        ...

    async def clean(self) -> None:
        """Erases the words of removed documents from the store's files. Its log may still have them. A store that does
        not control its files does nothing, and documents how long the words stay."""
        ...


class VectorSearch(Protocol):
    """Finds the nearest documents by cosine, in the catalog itself. A document's own transaction writes its vector.

    ``search.catalog_nearest`` makes a vector store of it.
    """

    def nearest(
        self,
        view: CatalogView,
        namespace: str,
        vector: FloatArray,
        depth: int,
        conditions: Sequence[Condition] = (),
        as_of: int | None = None,
    ) -> list[int]:
        """The keys of the nearest documents in the state of ``view``; see ``Nearest.nearest``. ``view`` must be a view
        of this catalog."""
        ...

    def build_graphs(self, above: int) -> int:
        """Builds what speeds up searches in each namespace with more documents than ``above``, where it lacks. It takes
        minutes for a million documents. Searches and writes go on. Returns the number of namespaces that lacked it, at
        least 1 where that can't be seen: 0 means that there is no more to do. A failure is logged."""
        ...

    def stop(self) -> None:
        """Ends a ``build_graphs`` under way, from any thread. No later one begins."""
        ...


class Catalog(NextLearnerWrites, SharedCatalog, Protocol):
    """One collection of documents."""

    @property
    def vectors(self) -> VectorSearch | None:
        """The search by vectors. None: another vector store must follow the catalog."""
        ...

    @property
    def words(self) -> WordSearch:
        """The search by words. A document's words are written and removed together with the document."""
        ...

    @property
    def collection_id(self) -> str:
        """The id of this collection. Derived data names it. A restored copy of the catalog has the same id."""
        ...

    @property
    def history_seconds(self) -> int:
        """The time for which past versions are kept, in seconds. 0: none are kept."""
        ...

    def close(self) -> None:
        """Commits the queued writes, then closes. Later writes raise UnavailableError."""
        ...

    def view(self, at_least: int | None = None) -> AbstractContextManager[CatalogView]:
        """Opens a view. Close it soon, because an open view delays the erasing of purged text. The ``with`` raises
        CatalogReadError if the store can't be read. ``at_least``: a ``nodes.Replica`` may have the view."""
        ...

    # Documents

    def check_room(self, view: CatalogView, document: Document, stored: StoredDocument | None) -> None:
        """QuotaExceededError if the quota has no room for the document's text, when it replaces ``stored``.

        This check saves the cost of encoding. Only ``put`` decides.
        """
        ...

    def put(
        self,
        document: Document,
        gradient: Gradient,
        expected_version: int | None,
        sentences: SentenceVectors | None = None,
    ) -> Future[PutResult]:
        """Stores a version of a document. ``expected_version``: 0 for a document that must be absent, None for any.

        Without ``sentences`` a version with the title and text of the one before has the vectors of that one.
        VersionConflictError, QuotaExceededError.
        """
        ...

    def put_sentences(self, began: int, sentences: SentenceVectors) -> Future[bool]:
        """Stores the vectors of the version that began at ``began``. False if it is gone or has vectors already.

        They count as the namespace's bytes, and no limit refuses them: a query asks for them, not a writer.
        """
        ...

    def delete(
        self, namespace: str, id: str, expected_version: int | None, *, purge: bool = False
    ) -> Future[DeleteResult]:
        """Deletes a document. ``purge`` also removes its past versions. A deleted document can still be purged.

        A purge may be repeated with the same ``expected_version``, because its answer may have been lost. Each purge
        adds an erasure in the same transaction. NotFoundError, VersionConflictError.
        """
        ...

    # The past

    def expire_history(self, before_us: int | None, limit: int) -> Future[list[str] | None]:
        """Drops up to ``limit`` past versions that ended before a time, in microseconds since 1970. None: any of them.

        Returns the digests of their gradients; None where there are no more such versions.
        """
        ...

    def replace_past_gradient(self, began: int, digest: str, gradient: Gradient) -> Future[bool]:
        """Replaces the gradient ``digest`` of the past version that began at ``began``. False where it no longer has
        that gradient."""
        ...

    # Codecs

    def begin_recoding(self, codec: str) -> Future[None]:
        """Gives the collection another codec. Its stored gradients keep theirs until they are recoded."""
        ...

    def end_recoding(self) -> Future[None]:
        """Records that all gradients have the collection's codec."""
        ...

    # Purges

    def finish_erasures(self, numbers: Collection[int]) -> Future[None]:
        """Removes these erasures, because all traces of their purges are erased."""
        ...

    def empty_log(self) -> Future[bool]:
        """Empties the store's log, which still has deleted data. False where an open view of an older state prevents
        it: try again. A store that does not control its log returns true and documents how long the log stays."""
        ...
