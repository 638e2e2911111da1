"""Reads of the catalog, all on one state."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.contract import MAX_KEYS
from bank_service.catalog.entries import (
    Candidate,
    Change,
    Erasure,
    ListEntry,
    NextLearner,
    Score,
    Totals,
    Usage,
    VersionText,
)
from bank_service.catalog.failures import namespace_not_found
from bank_service.catalog.sql import erasures, gradients, history, next_rows, sentence_rows
from bank_service.catalog.sql.prepared import Prepared, among, listed
from bank_service.catalog.sql.quota import usage
from bank_service.catalog.sql.rows import to_stored
from bank_service.catalog.sql.search_rows import SearchRows
from bank_service.catalog.sql.tables import collection, living, now, past, recoding, versions
from bank_service.values.documents import Hit, StoredDocument
from bank_service.values.filters import Condition
from bank_service.wire import limits

_LAST_CHARACTER = "\U0010ffff"
_V = versions.c
_OF_NAMESPACE = _V.namespace == sa.bindparam("namespace")


def _hits(*more: sa.ColumnElement[str]) -> Prepared:
    wanted = (_V.began, _V.id, _V.version, _V.gradient_digest, _V.gradient_bytes)
    return Prepared(sa.select(*wanted, *more).where(_V.began.in_(among("sequences", sa.BigInteger))))


_SEQUENCE = Prepared(sa.select(collection.c.sequence))
_IN_NAMESPACE = Prepared(sa.select(_V.key).where(_OF_NAMESPACE).limit(1))
_LIVING = Prepared(sa.select(versions).where(_OF_NAMESPACE, _V.id == sa.bindparam("id"), living))
_CANDIDATES = Prepared(
    sa.select(_V.key, _V.id, _V.began, _V.embedding, _V.version, _V.gradient_digest, _V.gradient_bytes).where(
        _V.key.in_(among("keys", sa.BigInteger)), living
    )
)
_HITS = _hits()
_HITS_WITH_TEXT = _hits(_V.title, _V.text)


class SqlView:
    """One committed state of the catalog: a transaction that reads. See ``contract.CatalogView``."""

    def __init__(self, connection: sa.Connection, search_rows: SearchRows, sequence: int | None = None) -> None:
        """``sequence``: of this state, where it is known."""
        self._connection = connection
        self._search_rows = search_rows
        self._sequence = sequence

    @property
    def connection(self) -> sa.Connection:
        """For the store's own searches."""
        return self._connection

    # Documents

    def sequence(self) -> int:
        if self._sequence is None:  # the view stays at one state
            ((self._sequence,),) = _SEQUENCE.rows(self._connection)
        return int(self._sequence)

    def note_sequence(self, sequence: int) -> None:
        """The sequence of this state, which another statement has read along."""
        self._sequence = sequence

    def sequence_of(self, namespaces: Collection[str]) -> int:
        query = sa.select(sa.func.max(_V.began)).where(_V.namespace.in_(list(namespaces)), now)
        return int(self._connection.execute(query).scalar_one() or 0)

    def check_namespace(self, namespace: str) -> None:
        if namespace != limits.DEFAULT_NAMESPACE and not _IN_NAMESPACE.rows(self._connection, namespace=namespace):
            raise namespace_not_found(namespace)

    def get(self, namespace: str, id: str) -> StoredDocument | None:
        row = _LIVING.one(self._connection, namespace=namespace, id=id)
        return None if row is None else to_stored(row)

    def page(
        self, namespace: str, after_id: str, size: int, conditions: Sequence[Condition] = (), prefix: str = ""
    ) -> list[ListEntry]:
        if "\0" in prefix:  # no id has one, and PostgreSQL takes none
            return []
        after_id = after_id.split("\0")[0]  # the same ids come after it
        query = sa.select(_V.id, _V.title, _V.version, _V.gradient_digest, _V.num_text_bytes, _V.metadata)
        few = self.matching(namespace, conditions, MAX_KEYS + 1) if conditions else []
        if conditions and len(few) <= MAX_KEYS:  # found by their metadata, without a scan of the namespace
            query = query.where(_V.key.in_(few))
        else:
            query = query.where(_V.namespace == namespace, *map(self._search_rows.holds, conditions))
        if prefix:  # the bound is longer than any id, so it comes after all ids with the prefix
            query = query.where(_V.id >= prefix, _V.id <= prefix + _LAST_CHARACTER * limits.MAX_ID_BYTES)
        rows = self._connection.execute(query.where(_V.id > after_id, living).order_by(_V.id).limit(size))
        return [ListEntry(*row[:-1], json.loads(row[-1])) for row in rows]

    def after_key(self, key: int, limit: int) -> list[StoredDocument]:
        query = sa.select(versions).where(_V.key > key, living).order_by(_V.key).limit(limit)
        return [to_stored(row) for row in self._connection.execute(query).mappings()]

    def began(self, namespace: str, ids: Sequence[str], as_of: int | None = None) -> dict[str, int]:
        return history.began(self._connection, namespace, ids, as_of)

    def hits(self, scores: dict[int, Score], include_text: bool) -> list[Hit]:
        read = _HITS_WITH_TEXT if include_text else _HITS
        rows = {row[0]: row for row in read.rows(self._connection, sequences=listed(scores))}
        found = [(rows[began], score) for began, score in scores.items() if began in rows]
        return [
            Hit(row[1], row[2], score.value, score.cosine, row[3], row[4], row[0], *row[5:7]) for row, score in found
        ]

    def texts(self, began: Sequence[int]) -> dict[int, VersionText]:
        return sentence_rows.texts(self._connection, began)

    # Changes

    def changes(self, after_sequence: int, limit: int) -> list[Change]:
        query = _changes(after_sequence, limit).where(now)
        return [Change(*row) for row in self._connection.execute(query)]

    def changes_of(
        self, namespace: str, after_sequence: int, limit: int | None = None, *, alive: bool = False
    ) -> list[Change]:
        query = _changes(after_sequence, limit).where(_V.namespace == namespace, living if alive else now)
        return [Change(*row) for row in self._connection.execute(query)]

    # Search

    def candidates(self, keys: Sequence[int]) -> list[Candidate]:
        return [Candidate(*row) for row in _CANDIDATES.rows(self._connection, keys=listed(keys))]

    def matching(
        self, namespace: str, conditions: Sequence[Condition], limit: int | None = None, as_of: int | None = None
    ) -> list[int]:
        return self._search_rows.matching(self._connection, namespace, conditions, limit, as_of)

    def among(self, keys: Sequence[int], conditions: Sequence[Condition], as_of: int | None = None) -> set[int]:
        return self._search_rows.among(self._connection, keys, conditions, as_of)

    # The past

    def horizon(self, namespace: str) -> int:
        return history.horizon(self._connection, namespace)

    def past_candidates(
        self, namespace: str, as_of: int, conditions: Sequence[Condition], after: int, limit: int
    ) -> tuple[list[Candidate], int] | None:
        return history.candidates(self._connection, namespace, as_of, conditions, after, limit)

    # Gradients

    def gradient_sizes(self, digests: Sequence[str]) -> dict[str, int]:
        return gradients.sizes(self._connection, digests)

    def gradients(self, after_digest: str, limit: int) -> dict[str, int]:
        return gradients.page(self._connection, after_digest, limit)

    def gradient_namespaces(self, digests: Sequence[str]) -> dict[str, set[str]]:
        return gradients.namespaces(self._connection, digests)

    def owners(self, digest: str, limit: int) -> list[StoredDocument]:
        return gradients.owners(self._connection, digest, limit, now)

    def past_owners(self, digest: str, limit: int) -> list[StoredDocument]:
        return gradients.owners(self._connection, digest, limit, past)

    def is_recoding(self) -> bool:
        return self._connection.execute(sa.select(recoding)).first() is not None

    # The next learner

    def next_learner(self) -> NextLearner | None:
        return next_rows.learner(self._connection)

    def gradients_of(self, fingerprint: str, began: Sequence[int]) -> dict[int, tuple[str, int]] | None:
        return next_rows.named(self._connection, fingerprint, began)

    def lacking_next(self, after: int, limit: int) -> list[int]:
        return next_rows.lacking(self._connection, after, limit)

    def num_next(self) -> tuple[int, int]:
        return next_rows.number(self._connection)

    def next_owners(self, digest: str, limit: int) -> list[int]:
        return next_rows.owners(self._connection, digest, limit)

    # Figures

    def usage(self, namespace: str) -> Usage:
        return usage(self._connection, namespace)

    def totals(self, may_see: Callable[[str], bool] | None = None) -> Totals:
        return gradients.totals(self._connection, may_see)

    # Purges

    def pending_erasures(self, after: int, limit: int) -> list[Erasure]:
        return erasures.pending(self._connection, after, limit)


def _changes(after_sequence: int, limit: int | None) -> sa.Select[Any]:
    query = sa.select(_V.began, _V.key, _V.namespace, _V.embedding).where(_V.began > after_sequence)
    return query.order_by(_V.began).limit(limit)
