"""Reads of the catalog, all on one snapshot."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.sqlite.prepared import Prepared, among, listed
from bank_service.catalog.sqlite.quota import all_usage
from bank_service.catalog.sqlite.tables import collection, documents, history, horizons, recoding
from bank_service.errors import NotFoundError
from bank_service.values.documents import Document, Gradient, Hit, StoredDocument
from bank_service.wire import limits

MAX_VARIABLES = 500  # in one IN (…); SQLite's own limit was 999 for long


def _hits(*more: sa.ColumnElement[str]) -> Prepared:
    columns = documents.c
    wanted = (columns.key, columns.id, columns.version, columns.gradient_digest, columns.gradient_bytes)
    return Prepared(sa.select(*wanted, *more).where(columns.key.in_(among("keys"))))


_SEQUENCE = Prepared(sa.select(collection.c.sequence))
_IN_NAMESPACE = Prepared(sa.select(documents.c.key).where(documents.c.namespace == sa.bindparam("namespace")).limit(1))
_LIVING = Prepared(
    sa.select(documents).where(
        documents.c.namespace == sa.bindparam("namespace"),
        documents.c.id == sa.bindparam("id"),
        sa.not_(documents.c.deleted),
    )
)
_KEYS = Prepared(
    sa.select(documents.c.id, documents.c.key).where(
        documents.c.namespace == sa.bindparam("namespace"),
        documents.c.id.in_(among("ids")),
        sa.not_(documents.c.deleted),
    )
)
_CANDIDATES = Prepared(
    sa.select(
        documents.c.key,
        documents.c.id,
        documents.c.sequence,
        documents.c.embedding,
        documents.c.version,
        documents.c.gradient_digest,
        documents.c.gradient_bytes,
    ).where(documents.c.key.in_(among("keys")), sa.not_(documents.c.deleted))
)
_HITS = _hits()
_HITS_WITH_TEXT = _hits(documents.c.title, documents.c.text)
_SIZES = [
    Prepared(
        sa.select(table.c.gradient_digest, sa.func.max(table.c.gradient_bytes))
        .where(table.c.gradient_digest.in_(among("digests")))
        .group_by(table.c.gradient_digest)
    )
    for table in (documents, history)
]
_NAMESPACES = [
    Prepared(
        sa.select(table.c.gradient_digest, table.c.namespace)
        .where(table.c.gradient_digest.in_(among("digests")))
        .distinct()
    )
    for table in (documents, history)
]


@dataclass(frozen=True, slots=True)
class Change:
    """The latest change of one document."""

    sequence: int
    key: int
    namespace: str
    embedding: bytes | None  # None: deleted


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a query needs to rank a document, and what its hit says of it."""

    key: int
    id: str
    sequence: int
    embedding: bytes
    version: int
    gradient_digest: str
    gradient_bytes: int

    def hit(self, score: Score) -> Hit:
        """Without title and text."""
        return Hit(self.id, self.version, score.value, score.cosine, self.gradient_digest, self.gradient_bytes)


@dataclass(frozen=True, slots=True)
class Score:
    """How well a document answers a query."""

    value: float  # what hits are ordered by
    cosine: float


@dataclass(frozen=True, slots=True)
class ListEntry:
    """A document in a list."""

    id: str
    title: str
    version: int
    gradient_digest: str
    num_text_bytes: int


@dataclass(frozen=True, slots=True)
class Totals:
    """What the catalog holds."""

    num_documents: dict[str, int]  # by namespace, also those that lost their last document
    num_gradients: int  # of documents and their past versions
    gradient_bytes: int
    num_past_versions: int
    oldest_as_of: int  # from which on every namespace's past is known


def to_stored(row: Mapping[str, Any] | sa.RowMapping) -> StoredDocument:
    document = Document(row["namespace"], row["id"], row["title"], row["text"], json.loads(row["metadata"]))
    gradient = Gradient(
        row["gradient_digest"], row["gradient_bytes"], row["num_tokens"], bool(row["truncated"]), row["embedding"]
    )
    return StoredDocument(row["key"], document, gradient, row["version"], row["sequence"], row["updated_us"])


class CatalogView:
    """One committed state of the catalog."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    @property
    def connection(self) -> sa.Connection:
        """For reads of tables that have a module of their own."""
        return self._connection

    def sequence(self) -> int:
        """Of the last change in this state."""
        (row,) = _SEQUENCE.rows(self._connection)
        return int(row[0])

    def has_namespace(self, namespace: str) -> bool:
        """It has or had a document; the default namespace always exists."""
        return namespace == limits.DEFAULT_NAMESPACE or bool(_IN_NAMESPACE.rows(self._connection, namespace=namespace))

    def check_namespace(self, namespace: str) -> None:
        """NotFoundError for one that never had a document."""
        if not self.has_namespace(namespace):
            raise NotFoundError(f"namespace {namespace!r} has no documents", kind="namespace", name=namespace)

    def get(self, namespace: str, id: str) -> StoredDocument | None:
        row = _LIVING.one(self._connection, namespace=namespace, id=id)
        return None if row is None else to_stored(row)

    def keys(self, namespace: str, ids: Sequence[str]) -> dict[str, int]:
        """id → key of those that exist. At most MAX_VARIABLES ids."""
        return {id: key for id, key in _KEYS.rows(self._connection, namespace=namespace, ids=listed(ids))}

    def page(self, namespace: str, after_id: str, size: int) -> list[ListEntry]:
        """Up to ``size`` documents after ``after_id`` in order of id (of its UTF-8 bytes)."""
        columns = documents.c
        query = (
            sa.select(columns.id, columns.title, columns.version, columns.gradient_digest, columns.num_text_bytes)
            .where(columns.namespace == namespace, columns.id > after_id, sa.not_(columns.deleted))
            .order_by(columns.id)
            .limit(size)
        )
        return [ListEntry(*row) for row in self._connection.execute(query)]

    def changes(self, after_sequence: int, limit: int) -> list[Change]:
        """Up to ``limit`` changes in order of sequence; a document changed twice shows its last change only."""
        columns = documents.c
        query = (
            sa.select(columns.sequence, columns.key, columns.namespace, columns.embedding)
            .where(columns.sequence > after_sequence)
            .order_by(columns.sequence)
            .limit(limit)
        )
        return [Change(*row) for row in self._connection.execute(query)]

    def changes_of(
        self, namespace: str, after_sequence: int, limit: int | None = None, *, alive: bool = False
    ) -> list[Change]:
        """Like ``changes``, of one namespace; all of them without a limit. ``alive``: without deletions."""
        columns = documents.c
        query = (
            sa.select(columns.sequence, columns.key, columns.namespace, columns.embedding)
            .where(columns.namespace == namespace, columns.sequence > after_sequence)
            .order_by(columns.sequence)
            .limit(limit)
        )
        if alive:
            query = query.where(sa.not_(columns.deleted))
        return [Change(*row) for row in self._connection.execute(query)]

    def candidates(self, keys: Sequence[int]) -> list[Candidate]:
        """Those of ``keys`` that are not deleted, in any order. At most MAX_VARIABLES keys."""
        return [Candidate(*row) for row in _CANDIDATES.rows(self._connection, keys=listed(keys))]

    def hits(self, scores: dict[int, Score], include_text: bool) -> list[Hit]:
        """A hit for each key in ``scores``, in its order; all must be in ``candidates``."""
        read = _HITS_WITH_TEXT if include_text else _HITS
        rows = {row[0]: row for row in read.rows(self._connection, keys=listed(scores))}
        found = [(rows[key], score) for key, score in scores.items()]
        return [Hit(row[1], row[2], score.value, score.cosine, *row[3:]) for row, score in found]

    def gradient_sizes(self, digests: Sequence[str]) -> dict[str, int]:
        """digest → bytes of those that a document has or had. At most MAX_VARIABLES digests."""
        found: dict[str, int] = {}
        for read in _SIZES:
            found.update({name: int(size) for name, size in read.rows(self._connection, digests=listed(digests))})
        return found

    def gradients(self, after_digest: str, limit: int) -> dict[str, int]:
        """digest → bytes of up to ``limit`` after ``after_digest``, in order of digest, of documents now and before."""
        found: dict[str, int] = {}
        for table in (documents, history):
            digest = table.c.gradient_digest
            query = sa.select(digest, sa.func.max(table.c.gradient_bytes)).where(digest > after_digest)
            page = self._connection.execute(query.group_by(digest).order_by(digest).limit(limit))
            found.update({name: int(size) for name, size in page})
        return {name: found[name] for name in sorted(found)[:limit]}

    def is_recoding(self) -> bool:
        """Gradients may have another codec than the collection."""
        return self._connection.execute(sa.select(recoding)).first() is not None

    def after_key(self, key: int, limit: int) -> list[StoredDocument]:
        """Up to ``limit`` documents of all namespaces after a key, in order of key."""
        query = (
            sa.select(documents)
            .where(documents.c.key > key, sa.not_(documents.c.deleted))
            .order_by(documents.c.key)
            .limit(limit)
        )
        return [to_stored(row) for row in self._connection.execute(query).mappings()]

    def owners(self, digest: str, limit: int) -> list[StoredDocument]:
        """Up to ``limit`` documents that have this gradient."""
        query = sa.select(documents).where(documents.c.gradient_digest == digest).limit(limit)
        return [to_stored(row) for row in self._connection.execute(query).mappings()]

    def gradient_namespaces(self, digests: Sequence[str]) -> dict[str, set[str]]:
        """digest → the namespaces whose documents have or had it. At most MAX_VARIABLES digests."""
        found: dict[str, set[str]] = {}
        for read in _NAMESPACES:
            for digest, namespace in read.rows(self._connection, digests=listed(digests)):
                found.setdefault(digest, set()).add(namespace)
        return found

    def totals(self, may_see: Callable[[str], bool] | None = None) -> Totals:
        """Of all namespaces, or of those that a caller may see as if there were no others."""
        counts = {name: used.num_documents for name, used in all_usage(self._connection).items()}
        if may_see is not None:
            counts = {name: count for name, count in counts.items() if may_see(name)}

        def seen(table: sa.Table) -> sa.ColumnElement[bool]:
            if may_see is None:
                return sa.true()
            # By ``+``, or SQLite takes the index by namespace, and then has a row to read for each digest.
            return sa.literal_column(f"+{table.name}.namespace").in_(list(counts))

        # A gradient counts once, however many documents and past versions have it.
        now, before = documents.c, history.c
        named = sa.exists().where(now.gradient_digest == before.gradient_digest, seen(documents))
        num_gradients = gradient_bytes = 0
        for table, chosen in ((documents, now.gradient_digest.is_not(None)), (history, sa.not_(named))):
            digest, size = table.c.gradient_digest, sa.func.max(table.c.gradient_bytes).label("size")
            each = sa.select(size).where(chosen, seen(table)).group_by(digest).subquery()
            sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(each.c.size), 0)).select_from(each)
            count, total = self._connection.execute(sums).one()
            num_gradients, gradient_bytes = num_gradients + int(count), gradient_bytes + int(total)
        past = sa.select(sa.func.count()).select_from(history).where(seen(history))
        oldest = sa.select(sa.func.coalesce(sa.func.max(horizons.c.sequence), 0)).where(seen(horizons))
        default = {limits.DEFAULT_NAMESPACE: 0} if may_see is None or may_see(limits.DEFAULT_NAMESPACE) else {}
        return Totals(
            {**default, **counts},
            num_gradients,
            gradient_bytes,
            int(self._connection.execute(past).scalar_one()),
            int(self._connection.execute(oldest).scalar_one()),
        )

    def sequence_of(self, namespaces: Collection[str]) -> int:
        """Of the last change in these namespaces; 0 where there was none."""
        columns = documents.c
        query = sa.select(sa.func.max(columns.sequence)).where(columns.namespace.in_(list(namespaces)))
        return int(self._connection.execute(query).scalar_one() or 0)
