"""The contract of a catalog. Every store of documents behind a bank follows it.

**Identity.** A document is a namespace and an id. It has one ``key`` for ever, also when it is deleted and comes back.
Every change gets the next ``sequence``, without gaps. A version is known by the sequence with which it began.

**Consistency.** Writes happen one after the other, each whole or not at all. A view that opens after a write's future
has its result sees that write. A view stays at one state from its first read on.

**Durability.** A write's future has its result only after the change survives a crash.

**Threads.** Every method of a ``Catalog`` may be called from any thread at any time. A ``CatalogView`` belongs to one
thread at a time.

**Errors.** Each method names its own. Beside them, every read may raise CatalogReadError. Every write's future may
raise UnavailableError, where the store can't be written or is closed, and InternalError for a bug.

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
    Totals,
    Usage,
)
from bank_service.values.documents import Document, Gradient, Hit, PutResult, StoredDocument
from bank_service.values.filters import Condition

MAX_KEYS = 500  # keys, ids or digests that one read takes, where its docstring says so


class CatalogView(Protocol):
    """Reads of one committed state. Valid inside the ``with`` of ``Catalog.view`` only."""

    # Documents

    def sequence(self) -> int:
        """The sequence of the last change; 0 before the first."""
        ...

    def sequence_of(self, namespaces: Collection[str]) -> int:
        """The sequence of the last change in these namespaces; 0 where there was none."""
        ...

    def check_namespace(self, namespace: str) -> None:
        """NotFoundError for a namespace that never had a document. The default namespace is always there."""
        ...

    def get(self, namespace: str, id: str) -> StoredDocument | None:
        """The document, or None where there is none now."""
        ...

    def page(self, namespace: str, after_id: str, size: int) -> list[ListEntry]:
        """Up to ``size`` documents after ``after_id``, in the order of their ids' UTF-8 bytes."""
        ...

    def after_key(self, key: int, limit: int) -> list[StoredDocument]:
        """Up to ``limit`` documents of all namespaces after a key, in order of key."""
        ...

    def began(self, namespace: str, ids: Sequence[str], as_of: int | None = None) -> dict[str, int]:
        """id → the sequence with which its version began that held at ``as_of``, or holds now.

        Without documents that did not exist then. At most MAX_KEYS ids.
        """
        ...

    def hits(self, scores: dict[int, Score], include_text: bool) -> list[Hit]:
        """A hit for each version in ``scores``, in its order. At most MAX_KEYS versions.

        A version is named by the sequence with which it began. Those that are gone are left out.
        """
        ...

    # Changes, for what follows the catalog

    def changes(self, after_sequence: int, limit: int) -> list[Change]:
        """Up to ``limit`` changes in order of sequence. A document that changed twice shows its last change only."""
        ...

    def changes_of(
        self, namespace: str, after_sequence: int, limit: int | None = None, *, alive: bool = False
    ) -> list[Change]:
        """Like ``changes``, of one namespace; all of them without a limit. ``alive``: without deletions."""
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
        """The keys among ``keys`` whose documents meet all conditions. ``as_of``: as in ``matching``."""
        ...

    # The past

    def horizon(self, namespace: str) -> int:
        """The oldest sequence at which all that the namespace held is known."""
        ...

    def past_candidates(
        self, namespace: str, as_of: int, conditions: Sequence[Condition], after: int, limit: int
    ) -> tuple[list[Candidate], int] | None:
        """The next of the past versions that the namespace held at ``as_of``, beside its documents that still live.

        Reads up to ``limit`` versions that ended after ``after``, which is ``as_of`` in the first call. Gives those
        that meet all conditions, and the next ``after``; None where there are no more.
        """
        ...

    # Gradients

    def gradient_sizes(self, digests: Sequence[str]) -> dict[str, int]:
        """digest → bytes of the gradients that a document or a past version has. At most MAX_KEYS digests."""
        ...

    def gradients(self, after_digest: str, limit: int) -> dict[str, int]:
        """The next ``limit`` gradients of documents and past versions, in order of digest: digest → bytes."""
        ...

    def gradient_namespaces(self, digests: Sequence[str]) -> dict[str, set[str]]:
        """digest → the namespaces of its documents and past versions. At most MAX_KEYS digests."""
        ...

    def owners(self, digest: str, limit: int) -> list[StoredDocument]:
        """Up to ``limit`` documents that have this gradient."""
        ...

    def past_owners(self, digest: str, limit: int) -> list[StoredDocument]:
        """Up to ``limit`` past versions that had this gradient. ``sequence`` is the one with which they began."""
        ...

    def is_recoding(self) -> bool:
        """Some gradients may have another codec than the collection."""
        ...

    # Figures

    def usage(self, namespace: str) -> Usage:
        """What a namespace holds."""
        ...

    def totals(self, may_see: Callable[[str], bool] | None = None) -> Totals:
        """Of all namespaces, or of those that a caller may see, as if there were no others."""
        ...

    # Purges

    def pending_erasures(self, after: int, limit: int) -> list[Erasure]:
        """Up to ``limit`` erasures with a number above ``after``, in order."""
        ...


class WordSearch(Protocol):
    """Best documents by BM25, with k1 = 1.2 and b = 0.75, over title and text.

    A word is a run of letters and digits, without regard to case or accents. A word in half of the documents or more
    counts next to nothing, and never less. An implementation must pass ``tests/bank/search/test_word_search.py``.
    """

    def best(
        self, view: CatalogView, namespace: str, text: str, conditions: Sequence[Condition], count: int
    ) -> dict[int, float]:
        """key → score of up to ``count`` documents that share a word with ``text`` and meet all conditions.

        Best first, ties by id. The score depends on the namespace's own documents alone. ``view`` is the catalog's.
        """
        ...

    async def clean(self) -> None:
        """Leaves nothing in the store's files, but in its log, of words that were removed before."""
        ...


class Catalog(Protocol):
    """One collection of documents."""

    @property
    def words(self) -> WordSearch:
        """The search by words. Each document's words are written and removed together with it."""
        ...

    @property
    def collection_id(self) -> str:
        """Names this store of the collection. Derived data carries it; a restored copy has the same."""
        ...

    @property
    def history_seconds(self) -> int:
        """How long past versions are kept; 0: not at all."""
        ...

    def close(self) -> None:
        """Ends what is queued, then closes. Later writes raise UnavailableError."""
        ...

    def view(self) -> AbstractContextManager[CatalogView]:
        """Opens a view. Keep it short: it holds up the erasing of purged text. The ``with`` raises CatalogReadError
        where the store can't be read."""
        ...

    # Documents

    def check_room(self, view: CatalogView, document: Document, stored: StoredDocument | None) -> None:
        """QuotaExceededError where ``put`` would have no room even for the text, in the place of ``stored``.

        It spares work. Only ``put`` decides.
        """
        ...

    def put(self, document: Document, gradient: Gradient, expected_version: int | None) -> Future[PutResult]:
        """Stores a version of a document. ``expected_version``: 0 for an absent document, None for any.

        VersionConflictError, QuotaExceededError.
        """
        ...

    def delete(
        self, namespace: str, id: str, expected_version: int | None, *, purge: bool = False
    ) -> Future[DeleteResult]:
        """Deletes a document. ``purge``: its past versions, too, also those of a document that is deleted already.

        A purge may come again with the version that it expected: its answer may have been lost. Each leaves an
        erasure, in the same transaction. NotFoundError, VersionConflictError.
        """
        ...

    # The past

    def expire_history(self, before_us: int | None, limit: int) -> Future[list[str] | None]:
        """Drops up to ``limit`` versions that ended before a time, or any where ``before_us`` is None.

        Gives the digests of their gradients; None where there are no more.
        """
        ...

    def replace_past_gradient(self, began: int, digest: str, gradient: Gradient) -> Future[bool]:
        """Gives a past version another gradient in the place of ``digest``. False where it has that no more."""
        ...

    # Codecs

    def begin_recoding(self, codec: str) -> Future[None]:
        """Gives the collection another codec; its gradients may not have it yet."""
        ...

    def end_recoding(self) -> Future[None]:
        """All gradients have the collection's codec."""
        ...

    # Purges

    def finish_erasures(self, numbers: Collection[int]) -> Future[None]:
        """Nothing of these purges is left anywhere."""
        ...

    def empty_log(self) -> Future[bool]:
        """Empties the log in which the store still has what was deleted. False where a view at an older state keeps
        the store from that: try again. A store whose log is not its own gives true, and says how long the log stays."""
        ...
