"""The catalog: documents, versions, namespaces, embeddings, digests, sequence numbers. The truth of a bank.

SQLite in WAL mode with synchronous=FULL: what ``put`` and ``delete`` have returned survives a crash. A deleted
document's row stays without its content, so that its key and version numbers are never used for other content
and every follower learns of the deletion by its sequence number.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from bank_service.attributes import fill_attributes, put_attributes, remove_attributes
from bank_service.catalog_file import check_catalog, check_not_lost, damaged
from bank_service.catalog_view import CatalogView, collection, documents, metadata, recoding, to_stored
from bank_service.documents import Document, Gradient, Outcome, PutResult, StoredDocument
from bank_service.errors import BankError, CollectionMismatchError, NotFoundError, VersionConflictError
from bank_service.group_commit import GroupCommit
from bank_service.lexical import clean_step, fill_words, put_words, remove_words, uncleaned
from bank_service.namespace_limits import LimitsOf, unlimited
from bank_service.quota import Usage, check_room, create_counters, enforced

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 3.0
SCHEMA_VERSION = 2  # 1 had no tables for filters and lexical retrieval


@dataclass(frozen=True, slots=True)
class CollectionIdentity:
    """What all gradients and embeddings of a bank have in common."""

    learner_fingerprint: str
    layout_id: str
    codec: str
    embedder: str
    embedding_dimension: int


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """An acknowledged deletion."""

    version: int  # that was deleted
    sequence: int
    digest: str  # of the gradient that the document had


class Catalog:
    """One collection in one SQLite file. Reads are snapshots; writes are grouped by one thread."""

    def __init__(self, path: Path, identity: CollectionIdentity, limits_of: LimitsOf = unlimited) -> None:
        """Opens or creates. CollectionMismatchError where the file holds another collection, CatalogDamagedError."""
        self._limits_of = limits_of
        if path.exists():
            check_catalog(path)
        self._engine = _engine(path)
        try:
            self.collection_id = self._claim(path, identity)  # changes with the file, not with the collection's content
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, sa.exc.DatabaseError) and not isinstance(error, sa.exc.OperationalError):
                raise damaged(path, str(error.orig)) from error
            raise
        # Connections of its own: what a reader opened while the disk was read-only never writes again.
        self._writer = GroupCommit(_engine(path))

    def close(self) -> None:
        """Commits what is queued, then closes. Deleted words leave the file as far as a few seconds go."""
        with contextlib.suppress(BankError):  # a disk that fails; the next start goes on
            self._clean_all(time.monotonic() + CLOSE_SECONDS)
        self._writer.close()
        self._engine.dispose()

    @contextmanager
    def view(self) -> Iterator[CatalogView]:
        """Reads of one committed state, unmoved by later writes."""
        with self._engine.begin() as connection:
            yield CatalogView(connection)

    def check_room(self, view: CatalogView, document: Document, stored: StoredDocument | None) -> None:
        """QuotaExceededError where ``put`` has no room for the text alone, in the place of what is ``stored``.

        For before the work is done. Only ``put`` itself, which is alone then, finds all that has no room.
        """
        num_bytes = len(document.text.encode())
        if stored is not None:
            num_bytes -= len(stored.document.text.encode()) + stored.gradient.num_bytes
        more = Usage(0 if stored else 1, num_bytes)
        check_room(view.connection, document.namespace, self._limits_of(document.namespace), more)

    def put(self, document: Document, gradient: Gradient, expected_version: int | None) -> Future[PutResult]:
        """Stores a version of a document. VersionConflictError where it isn't at ``expected_version``,
        QuotaExceededError."""

        def operation(connection: sa.Connection) -> PutResult:
            with enforced(connection, document.namespace, self._limits_of(document.namespace)):
                return _put(connection, document, gradient, expected_version)

        return self._writer.submit(operation)

    def delete(self, namespace: str, id: str, expected_version: int | None) -> Future[DeleteResult]:
        """Deletes a document. NotFoundError, VersionConflictError."""
        return self._writer.submit(lambda connection: _delete(connection, namespace, id, expected_version))

    def clean_words(self, number: int, num_removed: int, *, first: bool) -> Future[bool]:
        """One ``lexical.clean_step``."""
        return self._writer.submit(lambda connection: clean_step(connection, number, num_removed, first=first))

    def _clean_all(self, deadline: float) -> None:
        with self.view() as view:
            tables = uncleaned(view.connection)
        for number, num_removed in tables.items():
            first = True
            while time.monotonic() < deadline and not self.clean_words(number, num_removed, first=first).result():
                first = False

    def begin_recoding(self, codec: str) -> Future[None]:
        """The collection has another codec from now on, and gradients that may not have it yet."""
        return self._writer.submit(lambda connection: _begin_recoding(connection, codec))

    def end_recoding(self) -> Future[None]:
        """All gradients have the collection's codec."""
        return self._writer.submit(_end_recoding)

    def _claim(self, path: Path, identity: CollectionIdentity) -> str:
        wanted = asdict(identity)
        with self._engine.begin() as connection:
            metadata.create_all(connection)
            create_counters(connection)
            row = connection.execute(sa.select(collection)).mappings().one_or_none()
            if row is None:
                check_not_lost(path)
                created = {"id": 1, "schema_version": SCHEMA_VERSION, "sequence": 0, "uuid": secrets.token_hex(16)}
                connection.execute(sa.insert(collection).values(**created, **wanted))
                return str(created["uuid"])
            if row["schema_version"] == 1:
                row = _upgrade(connection, path)
        for name, value in {"schema_version": SCHEMA_VERSION, **wanted}.items():
            if row[name] != value:
                raise CollectionMismatchError(
                    f"{name} of the collection in {path.parent} must be {row[name]}, got {value}; "
                    "use another data directory (learner and embedder stay; `regrad recode` changes a codec)"
                )
        return str(row["uuid"])


def _upgrade(connection: sa.Connection, path: Path) -> sa.RowMapping:
    """From schema 1, whole or not at all: makes what filters and lexical retrieval need of the documents."""
    logger.info("making the tables for filters and lexical retrieval in %s; minutes for a million documents", path)
    for index in documents.indexes:
        index.create(connection, checkfirst=True)
    fill_attributes(connection)
    fill_words(connection)
    connection.execute(sa.update(collection).values(schema_version=SCHEMA_VERSION))
    return connection.execute(sa.select(collection)).mappings().one()


def _begin_recoding(connection: sa.Connection, codec: str) -> None:
    connection.execute(sa.update(collection).values(codec=codec))
    connection.execute(sa.delete(recoding))
    connection.execute(sa.insert(recoding).values(id=1))


def _end_recoding(connection: sa.Connection) -> None:
    connection.execute(sa.delete(recoding))


def stored_codec(path: Path) -> str | None:
    """The codec of the collection in a catalog's file; None where there is none yet, or none that can be read, which
    ``Catalog`` then says. Changes nothing."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            row = connection.execute("SELECT codec FROM collection").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        f"sqlite:///{path}",
        pool_size=8,
        max_overflow=-1,  # bounded by the threads that read
        connect_args={"check_same_thread": False, "timeout": 30.0},
    )

    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # else the driver commits on its own before some statements
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    sa.event.listen(engine, "connect", on_connect)
    sa.event.listen(engine, "begin", on_begin)
    return engine


# Built once: to build a statement and its cache key costs SQLAlchemy more than SQLite takes to run it.
_CURRENT = sa.select(documents).where(
    documents.c.namespace == sa.bindparam("namespace"), documents.c.id == sa.bindparam("id")
)
_NEXT_SEQUENCE = sa.update(collection).values(sequence=collection.c.sequence + 1).returning(collection.c.sequence)
_INSERT = sa.insert(documents).returning(documents.c.key)
_UPDATE = sa.update(documents).where(documents.c.key == sa.bindparam("row_key"))


def _current(connection: sa.Connection, namespace: str, id: str) -> sa.RowMapping | None:
    return connection.execute(_CURRENT, {"namespace": namespace, "id": id}).mappings().one_or_none()


def _check_version(row: sa.RowMapping | None, namespace: str, id: str, expected: int | None) -> None:
    actual = row["version"] if row is not None and not row["deleted"] else 0
    if expected is not None and expected != actual:
        raise version_conflict(namespace, id, expected, actual)


def version_conflict(namespace: str, id: str, expected: int, actual: int) -> VersionConflictError:
    state = f"version {actual}" if actual else "no such document"
    return VersionConflictError(
        f"document {id!r} in namespace {namespace!r} must be at version {expected} (0: absent), got {state}; "
        "read it again and retry",
        namespace=namespace,
        id=id,
        expected_version=expected,
        actual_version=actual,
    )


def document_not_found(namespace: str, id: str) -> NotFoundError:
    return NotFoundError(f"document {id!r} is not in namespace {namespace!r}", kind="document", name=id)


def _next_sequence(connection: sa.Connection) -> int:
    return int(connection.execute(_NEXT_SEQUENCE).scalar_one())


def _put(connection: sa.Connection, document: Document, gradient: Gradient, expected_version: int | None) -> PutResult:
    row = _current(connection, document.namespace, document.id)
    _check_version(row, document.namespace, document.id, expected_version)
    alive = row is not None and not row["deleted"]
    replaced = row["gradient_digest"] if row is not None and alive else None
    content_digest = document.content_digest
    same_gradient = row is not None and (replaced, row["embedding"], row["num_tokens"]) == (
        gradient.digest,
        gradient.embedding,
        gradient.num_tokens,  # differs where the one was uploaded and the other encoded here
    )
    if row is not None and same_gradient and row["content_digest"] == content_digest:
        return PutResult(to_stored(row), Outcome.UNCHANGED)
    values: dict[str, Any] = {
        "version": 1 if row is None else row["version"] + 1,
        "sequence": _next_sequence(connection),
        "deleted": False,
        "updated_us": time.time_ns() // 1000,
        "title": document.title,
        "text": document.text,
        "num_text_bytes": len(document.text.encode()),
        "metadata": json.dumps(dict(document.metadata), sort_keys=True),
        "content_digest": content_digest,
        "gradient_digest": gradient.digest,
        "gradient_bytes": gradient.num_bytes,
        "num_tokens": gradient.num_tokens,
        "truncated": gradient.truncated,
        "embedding": gradient.embedding,
    }
    if row is None:
        new = {"namespace": document.namespace, "id": document.id, **values}
        key = int(connection.execute(_INSERT, new).scalar_one())
    else:
        key = row["key"]
        connection.execute(_UPDATE, {"row_key": key, **values})
        remove_attributes(connection, key)
    put_attributes(connection, key, document.namespace, document.metadata)
    if row is None or not alive or (row["title"], row["text"]) != (document.title, document.text):
        if row is not None and alive:
            remove_words(connection, row["key"], document.namespace, row["title"], row["text"])
        put_words(connection, key, document.namespace, document.title, document.text)
    outcome = Outcome.UPDATED if alive else Outcome.CREATED
    stored = StoredDocument(key, document, gradient, values["version"], values["sequence"], values["updated_us"])
    return PutResult(stored, outcome, replaced if replaced != gradient.digest else None)


def _delete(connection: sa.Connection, namespace: str, id: str, expected_version: int | None) -> DeleteResult:
    row = _current(connection, namespace, id)
    if row is None or row["deleted"]:
        raise document_not_found(namespace, id)
    _check_version(row, namespace, id, expected_version)
    sequence = _next_sequence(connection)
    emptied = {
        "sequence": sequence,
        "deleted": True,
        "updated_us": time.time_ns() // 1000,
        "title": "",
        "text": "",
        "num_text_bytes": 0,
        "metadata": "{}",
        "content_digest": None,
        "gradient_digest": None,
        "gradient_bytes": 0,
        "embedding": None,
    }
    connection.execute(_UPDATE, {"row_key": row["key"], **emptied})
    remove_attributes(connection, row["key"])
    remove_words(connection, row["key"], namespace, row["title"], row["text"])
    return DeleteResult(row["version"], sequence, row["gradient_digest"])
