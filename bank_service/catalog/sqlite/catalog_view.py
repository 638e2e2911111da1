"""Reads of the catalog, all on one snapshot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import sqlalchemy as sa

from bank_service.catalog.entries import Candidate, Change, Erasure, ListEntry, Score, Totals, Usage
from bank_service.catalog.failures import namespace_not_found
from bank_service.catalog.sqlite import attributes, erasures, history, tables
from bank_service.catalog.sqlite.lexical import uncleaned
from bank_service.catalog.sqlite.lexical_search import best_words
from bank_service.catalog.sqlite.prepared import Prepared, among, listed
from bank_service.catalog.sqlite.quota import all_usage, usage
from bank_service.catalog.sqlite.rows import to_stored
from bank_service.catalog.sqlite.tables import collection, documents, horizons, recoding
from bank_service.values.documents import Hit, StoredDocument
from bank_service.values.filters import Condition
from bank_service.wire import limits


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
    for table in (documents, tables.history)
]
_NAMESPACES = [
    Prepared(
        sa.select(table.c.gradient_digest, table.c.namespace)
        .where(table.c.gradient_digest.in_(among("digests")))
        .distinct()
    )
    for table in (documents, tables.history)
]


class SqliteView:
    """One committed state of the catalog: a transaction that reads. See ``contract.CatalogView``."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def sequence(self) -> int:
        (row,) = _SEQUENCE.rows(self._connection)
        return int(row[0])

    def check_namespace(self, namespace: str) -> None:
        if namespace != limits.DEFAULT_NAMESPACE and not _IN_NAMESPACE.rows(self._connection, namespace=namespace):
            raise namespace_not_found(namespace)

    def get(self, namespace: str, id: str) -> StoredDocument | None:
        row = _LIVING.one(self._connection, namespace=namespace, id=id)
        return None if row is None else to_stored(row)

    def keys(self, namespace: str, ids: Sequence[str]) -> dict[str, int]:
        return {id: key for id, key in _KEYS.rows(self._connection, namespace=namespace, ids=listed(ids))}

    def page(self, namespace: str, after_id: str, size: int) -> list[ListEntry]:
        columns = documents.c
        query = (
            sa.select(columns.id, columns.title, columns.version, columns.gradient_digest, columns.num_text_bytes)
            .where(columns.namespace == namespace, columns.id > after_id, sa.not_(columns.deleted))
            .order_by(columns.id)
            .limit(size)
        )
        return [ListEntry(*row) for row in self._connection.execute(query)]

    def changes(self, after_sequence: int, limit: int) -> list[Change]:
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
        return [Candidate(*row) for row in _CANDIDATES.rows(self._connection, keys=listed(keys))]

    def hits(self, scores: dict[int, Score], include_text: bool) -> list[Hit]:
        read = _HITS_WITH_TEXT if include_text else _HITS
        rows = {row[0]: row for row in read.rows(self._connection, keys=listed(scores))}
        found = [(rows[key], score) for key, score in scores.items()]
        return [Hit(row[1], row[2], score.value, score.cosine, *row[3:]) for row, score in found]

    def gradient_sizes(self, digests: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for read in _SIZES:
            found.update({name: int(size) for name, size in read.rows(self._connection, digests=listed(digests))})
        return found

    def gradients(self, after_digest: str, limit: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for table in (documents, tables.history):
            digest = table.c.gradient_digest
            query = sa.select(digest, sa.func.max(table.c.gradient_bytes)).where(digest > after_digest)
            page = self._connection.execute(query.group_by(digest).order_by(digest).limit(limit))
            found.update({name: int(size) for name, size in page})
        return {name: found[name] for name in sorted(found)[:limit]}

    def is_recoding(self) -> bool:
        return self._connection.execute(sa.select(recoding)).first() is not None

    def after_key(self, key: int, limit: int) -> list[StoredDocument]:
        query = (
            sa.select(documents)
            .where(documents.c.key > key, sa.not_(documents.c.deleted))
            .order_by(documents.c.key)
            .limit(limit)
        )
        return [to_stored(row) for row in self._connection.execute(query).mappings()]

    def owners(self, digest: str, limit: int) -> list[StoredDocument]:
        query = sa.select(documents).where(documents.c.gradient_digest == digest).limit(limit)
        return [to_stored(row) for row in self._connection.execute(query).mappings()]

    def gradient_namespaces(self, digests: Sequence[str]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for read in _NAMESPACES:
            for digest, namespace in read.rows(self._connection, digests=listed(digests)):
                found.setdefault(digest, set()).add(namespace)
        return found

    def totals(self, may_see: Callable[[str], bool] | None = None) -> Totals:
        counts = {name: used.num_documents for name, used in all_usage(self._connection).items()}
        if may_see is not None:
            counts = {name: count for name, count in counts.items() if may_see(name)}

        def seen(table: sa.Table) -> sa.ColumnElement[bool]:
            if may_see is None:
                return sa.true()
            # By ``+``, or SQLite takes the index by namespace, and then has a row to read for each digest.
            return sa.literal_column(f"+{table.name}.namespace").in_(list(counts))

        # A gradient counts once, however many documents and past versions have it.
        now, before = documents.c, tables.history.c
        named = sa.exists().where(now.gradient_digest == before.gradient_digest, seen(documents))
        num_gradients = gradient_bytes = 0
        for table, chosen in ((documents, now.gradient_digest.is_not(None)), (tables.history, sa.not_(named))):
            digest, size = table.c.gradient_digest, sa.func.max(table.c.gradient_bytes).label("size")
            each = sa.select(size).where(chosen, seen(table)).group_by(digest).subquery()
            sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(each.c.size), 0)).select_from(each)
            count, total = self._connection.execute(sums).one()
            num_gradients, gradient_bytes = num_gradients + int(count), gradient_bytes + int(total)
        past = sa.select(sa.func.count()).select_from(tables.history).where(seen(tables.history))
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
        columns = documents.c
        query = sa.select(sa.func.max(columns.sequence)).where(columns.namespace.in_(list(namespaces)))
        return int(self._connection.execute(query).scalar_one() or 0)

    def matching(
        self, namespace: str, conditions: Sequence[Condition], limit: int | None = None, as_of: int | None = None
    ) -> list[int]:
        return attributes.matching(self._connection, namespace, conditions, limit, as_of)

    def among(self, keys: Sequence[int], conditions: Sequence[Condition], as_of: int | None = None) -> set[int]:
        return attributes.among(self._connection, keys, conditions, as_of)

    def best_words(self, namespace: str, text: str, conditions: Sequence[Condition], count: int) -> dict[int, float]:
        return best_words(self._connection, namespace, text, conditions, count)

    def horizon(self, namespace: str) -> int:
        return history.horizon(self._connection, namespace)

    def past_candidates(
        self, namespace: str, as_of: int, conditions: Sequence[Condition], after: int, limit: int
    ) -> tuple[list[Candidate], int] | None:
        return history.candidates(self._connection, namespace, as_of, conditions, after, limit)

    def began(self, namespace: str, ids: Sequence[str], as_of: int) -> dict[str, int]:
        return history.began(self._connection, namespace, ids, as_of)

    def past_hits(self, scores: dict[int, Score], include_text: bool) -> list[Hit]:
        return history.hits(self._connection, scores, include_text)

    def past_owners(self, digest: str, limit: int) -> list[StoredDocument]:
        return history.owners(self._connection, digest, limit)

    def usage(self, namespace: str) -> Usage:
        return usage(self._connection, namespace)

    def unfinished_erasures(self, after: int, limit: int) -> list[Erasure]:
        return erasures.unfinished(self._connection, after, limit)

    def repeatable_erasures(self) -> set[int]:
        return erasures.repeatable(self._connection)

    def uncleaned_words(self) -> dict[int, int]:
        return uncleaned(self._connection)
