"""A catalog in SQL: one thread does all writes, in groups. A store adds its engine, its searches and its upkeep.

A deletion is a version without content. It stays, so a document's key and version numbers are never used again for
other content. It also tells every follower of the deletion, by its sequence number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import sqlalchemy as sa

from bank_service.catalog.contract import CatalogView
from bank_service.catalog.entries import DeleteResult, NextLearner, SentenceVectors, Usage
from bank_service.catalog.nodes import Nodes, Replica
from bank_service.catalog.sql import erasures, next_rows, sentence_rows, versions
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.catalog_writes import delete_document, purge_document, put_document
from bank_service.catalog.sql.group_commit import GroupCommit
from bank_service.catalog.sql.quota import check_room, enforced
from bank_service.catalog.sql.search_rows import SearchRows
from bank_service.catalog.sql.tables import collection, recoding
from bank_service.errors import CatalogReadError, UnavailableError
from bank_service.runtime.seldom import Seldom
from bank_service.values.documents import Document, Gradient, PutResult, StoredDocument
from bank_service.values.namespace_limits import LimitsOf

logger = logging.getLogger(__name__)
T = TypeVar("T")


class SqlCatalog:
    """The methods of ``contract.Catalog`` that no store has to itself. A subclass sets the other attributes."""

    nodes: Nodes | None = None
    replica: Replica | None = None
    history_seconds: int
    collection_id: str
    _engine: sa.Engine  # of the readers
    _writer: GroupCommit

    def __init__(self, limits_of: LimitsOf, search_rows: SearchRows) -> None:
        self._limits_of = limits_of
        self._search_rows = search_rows
        self._read_failures = Seldom()

    @contextmanager
    def view(self, at_least: int | None = None) -> Iterator[SqlView]:
        try:
            with self._engine.begin() as connection:
                yield SqlView(connection, self._search_rows)
        except sa.exc.SQLAlchemyError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: sa.exc.SQLAlchemyError) -> CatalogReadError:
        """The error for a caller. The log has the cause, once a minute."""
        cause = getattr(error, "orig", None) or error
        if self._read_failures.is_due():
            logger.warning("the catalog can't be read now: %s", self._reason(error))
        return CatalogReadError(f"the catalog must be readable, got {type(cause).__name__}; try again")

    def _reason(self, error: sa.exc.SQLAlchemyError) -> str:
        """The error's cause for the log, without text of a document."""
        return str(getattr(error, "orig", None) or error)

    def check_room(self, view: CatalogView, document: Document, stored: StoredDocument | None) -> None:
        limits = self._limits_of(document.namespace)
        if not (limits.max_documents or limits.max_bytes):
            return
        num_bytes = len(document.text.encode())
        if stored is not None:
            num_bytes -= len(stored.document.text.encode()) + stored.gradient.num_bytes
            for text in view.texts([stored.sequence]).values():
                num_bytes -= text.sentences.num_bytes if text.sentences else 0
        more = Usage(0 if stored else 1, num_bytes)
        check_room(document.namespace, limits, view.usage(document.namespace), more)

    def put(
        self,
        document: Document,
        gradient: Gradient,
        expected_version: int | None,
        sentences: SentenceVectors | None = None,
    ) -> Future[PutResult]:
        def operation(connection: sa.Connection) -> PutResult:
            keep = self.history_seconds > 0
            self._check_gradient(connection, gradient.digest)
            with enforced(connection, document.namespace, self._limits_of(document.namespace)):
                result = put_document(
                    connection, self._search_rows, document, gradient, expected_version, sentences, keep=keep
                )
            self._drop_gradients(connection, result.dropped)
            return result

        return self._writer.submit(operation)

    def put_sentences(self, began: int, sentences: SentenceVectors) -> Future[bool]:
        return self._writer.submit(lambda connection: sentence_rows.add_missing(connection, began, sentences))

    def delete(
        self, namespace: str, id: str, expected_version: int | None, *, purge: bool = False
    ) -> Future[DeleteResult]:
        rows, keep = self._search_rows, self.history_seconds > 0

        def operation(connection: sa.Connection) -> DeleteResult:
            if purge:
                result = purge_document(connection, rows, namespace, id, expected_version)
            else:
                result = delete_document(connection, rows, namespace, id, expected_version, keep=keep)
            self._drop_gradients(connection, result.digests)
            return result

        return self._writer.submit(operation)

    def expire_history(self, before_us: int | None, limit: int) -> Future[list[str] | None]:
        def operation(connection: sa.Connection) -> list[str] | None:
            digests = versions.expire(connection, before_us, limit)
            self._drop_gradients(connection, digests or ())
            return digests

        return self._writer.submit(operation)

    def replace_past_gradient(self, began: int, digest: str, gradient: Gradient) -> Future[bool]:
        def operation(connection: sa.Connection) -> bool:
            self._check_gradient(connection, gradient.digest)
            return versions.replace_past_gradient(connection, began, digest, gradient)

        return self._writer.submit(operation)

    def begin_recoding(self, codec: str) -> Future[None]:
        return self._changed(lambda connection: _begin_recoding(connection, codec))

    def end_recoding(self) -> Future[None]:
        return self._writer.submit(_end_recoding)

    def begin_next(self, learner: NextLearner) -> Future[None]:
        return self._changed(lambda connection: next_rows.begin(connection, learner))

    def put_next(self, fingerprint: str, began: int, gradient: Gradient) -> Future[set[str]]:
        def operation(connection: sa.Connection) -> set[str]:
            self._check_gradient(connection, gradient.digest)
            return next_rows.put(connection, fingerprint, began, gradient)

        return self._writer.submit(operation)

    def drop_next(self) -> Future[None]:
        return self._changed(next_rows.drop)

    def finish_next(self) -> Future[bool]:
        return self._changed(next_rows.finish)

    def finish_erasures(self, numbers: Collection[int]) -> Future[None]:
        return self._writer.submit(lambda connection: erasures.finish(connection, numbers))

    def _changed(self, change: Callable[[sa.Connection], T]) -> Future[T]:
        """Changes a setting of the collection."""

        def operation(connection: sa.Connection) -> T:
            with self._changing_settings(connection):
                return change(connection)

        return self._writer.submit(operation)

    # A store that several processes have together overrides these. Each is called in a transaction that writes.

    def _check_gradient(self, connection: sa.Connection, digest: str) -> None:
        """UnavailableError where the gradient that a version is about to get may be removed meanwhile."""

    def _drop_gradients(self, connection: sa.Connection, digests: Collection[str]) -> None:
        """Perhaps no version names these gradients any more."""

    def _changing_settings(self, connection: sa.Connection) -> AbstractContextManager[None]:
        """Settings change inside the block. UnavailableError where other processes know them."""
        return nullcontext()


def _begin_recoding(connection: sa.Connection, codec: str) -> None:
    known = next_rows.learner(connection)
    if known is not None:
        raise UnavailableError(
            f"the collection is on its way to the learner {known.fingerprint} in {known.folder}; "
            "finish that upgrade or take it back"
        )
    connection.execute(sa.update(collection).values(codec=codec))
    connection.execute(sa.delete(recoding))
    connection.execute(sa.insert(recoding).values(id=1))


def _end_recoding(connection: sa.Connection) -> None:
    connection.execute(sa.delete(recoding))
