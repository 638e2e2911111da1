"""The catalog in SQLite: WAL mode with synchronous=FULL, so that an acknowledged change survives a crash.

A deletion is a version without content. It stays, so a document's key and version numbers are never used again for
other content. It also tells every follower of the deletion, by its sequence number.

SQLite's own means erase purged data from the files. ``secure_delete`` overwrites deleted rows with zeros. FTS5 merges
its lists of words (``words.clean``). A checkpoint empties the write-ahead log (``empty_log``). Older copies, such as
snapshots, keep their content.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.contract import CatalogView
from bank_service.catalog.entries import CollectionIdentity, DeleteResult, SentenceVectors, Usage
from bank_service.catalog.sqlite import erasures, history, sentence_rows, versions
from bank_service.catalog.sqlite.catalog_file import check_catalog, check_not_lost, damaged
from bank_service.catalog.sqlite.catalog_view import SqliteView
from bank_service.catalog.sqlite.catalog_writes import delete_document, purge_document, put_document
from bank_service.catalog.sqlite.fts5_words import Fts5Words
from bank_service.catalog.sqlite.group_commit import GroupCommit
from bank_service.catalog.sqlite.lexical import renew_words
from bank_service.catalog.sqlite.prepared import run_text
from bank_service.catalog.sqlite.quota import check_room, enforced
from bank_service.catalog.sqlite.tables import collection, metadata, recoding
from bank_service.catalog.sqlite.upgrade import SCHEMA_VERSION, upgrade
from bank_service.errors import BankError, CatalogReadError, CollectionMismatchError
from bank_service.values.documents import Document, Gradient, PutResult, StoredDocument
from bank_service.values.namespace_limits import LimitsOf, unlimited

CLOSE_SECONDS = 3.0


class SqliteCatalog:
    """One collection in one SQLite file; see ``contract.Catalog``. One thread does all writes, in groups."""

    def __init__(
        self,
        path: Path,
        identity: CollectionIdentity,
        limits_of: LimitsOf = unlimited,
        *,
        history_seconds: int | None = None,
    ) -> None:
        """Opens or creates. CollectionMismatchError where the file holds another collection, CatalogDamagedError.

        ``history_seconds``: see ``history.seconds_kept``.
        """
        self._limits_of = limits_of
        if path.exists():
            check_catalog(path)
        self._engine = _engine(path)
        try:
            # The id belongs to the file. It stays the same when the content changes.
            self.collection_id = self._open_collection(path, identity)
            with self._engine.begin() as connection:  # only after the collection proved to be the caller's
                renew_words(connection)
                self.history_seconds = history.seconds_kept(connection, history_seconds)
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, sa.exc.DatabaseError) and not isinstance(error, sa.exc.OperationalError):
                raise damaged(path, str(error.orig)) from error
            raise
        # The writer needs its own connections. One that was opened while the disk was read-only can never write.
        self._writer = GroupCommit(_engine(path))
        self.words = Fts5Words(self._writer)

    def close(self) -> None:
        """Commits the queued writes, then closes. It erases deleted words for a few seconds at most."""
        with contextlib.suppress(BankError):  # the disk may fail; the next start goes on
            self.words.clean_until(time.monotonic() + CLOSE_SECONDS)
        self._writer.close()
        self._engine.dispose()

    @contextmanager
    def view(self) -> Iterator[SqliteView]:
        self._writer.wait_to_read()
        try:
            with self._engine.begin() as connection:
                yield SqliteView(connection)
        except sa.exc.SQLAlchemyError as error:
            raise CatalogReadError(f"the catalog must be readable, got {error}") from error

    def check_room(self, view: CatalogView, document: Document, stored: StoredDocument | None) -> None:
        num_bytes = len(document.text.encode())
        if stored is not None:
            num_bytes -= len(stored.document.text.encode()) + stored.gradient.num_bytes
        more = Usage(0 if stored else 1, num_bytes)
        limits = self._limits_of(document.namespace)
        if limits.max_documents or limits.max_bytes:
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
            with enforced(connection, document.namespace, self._limits_of(document.namespace)):
                return put_document(connection, document, gradient, expected_version, sentences, keep=keep)

        return self._writer.submit(operation)

    def put_sentences(self, began: int, sentences: SentenceVectors) -> Future[bool]:
        return self._writer.submit(lambda connection: sentence_rows.add_missing(connection, began, sentences))

    def delete(
        self, namespace: str, id: str, expected_version: int | None, *, purge: bool = False
    ) -> Future[DeleteResult]:
        if purge:
            return self._writer.submit(lambda connection: purge_document(connection, namespace, id, expected_version))
        keep = self.history_seconds > 0
        return self._writer.submit(
            lambda connection: delete_document(connection, namespace, id, expected_version, keep=keep)
        )

    def expire_history(self, before_us: int | None, limit: int) -> Future[list[str] | None]:
        return self._writer.submit(lambda connection: versions.expire(connection, before_us, limit))

    def replace_past_gradient(self, began: int, digest: str, gradient: Gradient) -> Future[bool]:
        return self._writer.submit(
            lambda connection: versions.replace_past_gradient(connection, began, digest, gradient)
        )

    def begin_recoding(self, codec: str) -> Future[None]:
        return self._writer.submit(lambda connection: _begin_recoding(connection, codec))

    def end_recoding(self) -> Future[None]:
        return self._writer.submit(_end_recoding)

    def finish_erasures(self, numbers: Collection[int]) -> Future[None]:
        return self._writer.submit(lambda connection: erasures.finish(connection, numbers))

    def empty_log(self) -> Future[bool]:
        return self._writer.checkpoint()

    def _open_collection(self, path: Path, identity: CollectionIdentity) -> str:
        wanted = asdict(identity)
        with self._engine.begin() as connection:
            metadata.create_all(connection)
            row = connection.execute(sa.select(collection)).mappings().one_or_none()
            if row is None:
                check_not_lost(path)
                created = {"id": 1, "schema_version": SCHEMA_VERSION, "sequence": 0, "uuid": secrets.token_hex(16)}
                connection.execute(sa.insert(collection).values(**created, **wanted))
                return str(created["uuid"])
            if row["schema_version"] < SCHEMA_VERSION:
                row = upgrade(connection, row["schema_version"], path)
        for name, value in {"schema_version": SCHEMA_VERSION, **wanted}.items():
            if row[name] != value:
                raise CollectionMismatchError(
                    f"{name} of the collection in {path.parent} must be {row[name]}, got {value}; "
                    "use another data directory (learner and embedder stay; `regrad recode` changes a codec)"
                )
        return str(row["uuid"])


def _begin_recoding(connection: sa.Connection, codec: str) -> None:
    connection.execute(sa.update(collection).values(codec=codec))
    connection.execute(sa.delete(recoding))
    connection.execute(sa.insert(recoding).values(id=1))


def _end_recoding(connection: sa.Connection) -> None:
    connection.execute(sa.delete(recoding))


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        f"sqlite:///{path}",
        pool_size=8,
        max_overflow=-1,  # the number of reading threads bounds it
        connect_args={"check_same_thread": False, "timeout": 30.0},
        hide_parameters=True,  # parameters are texts of documents, which must not get into errors and logs
    )

    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # otherwise the driver commits by itself before some statements
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def on_begin(connection: sa.Connection) -> None:
        run_text(connection, "BEGIN")

    sa.event.listen(engine, "connect", on_connect)
    sa.event.listen(engine, "begin", on_begin)
    return engine
