"""The catalog's writes of one document. Each is one operation of ``GroupCommit``, whole or not at all."""

from __future__ import annotations

import json
import time
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.entries import DeleteResult, SentenceVectors
from bank_service.catalog.failures import document_not_found, version_conflict
from bank_service.catalog.sql import erasures, next_rows, sentence_rows, versions
from bank_service.catalog.sql.history import move_horizon
from bank_service.catalog.sql.prepared import Prepared
from bank_service.catalog.sql.rows import to_stored
from bank_service.catalog.sql.search_rows import SearchRows, has_new_text
from bank_service.catalog.sql.tables import collection
from bank_service.catalog.sql.versions import Row
from bank_service.values.documents import Document, Gradient, Outcome, PutResult, StoredDocument

_NEXT_SEQUENCE = Prepared(
    sa.update(collection).values(sequence=collection.c.sequence + 1).returning(collection.c.sequence)
)
_WITHOUT_CONTENT: dict[str, Any] = {
    "deleted": True,
    "content_digest": None,
    "gradient_digest": None,
    "gradient_bytes": 0,
    "num_tokens": 0,
    "truncated": False,
    "num_text_bytes": 0,
    "title": "",
    "metadata": "{}",
    "embedding": None,
    "text": "",
}


def put_document(
    connection: sa.Connection,
    search_rows: SearchRows,
    document: Document,
    gradient: Gradient,
    expected_version: int | None,
    sentences: SentenceVectors | None,
    *,
    keep: bool,
) -> PutResult:
    """Stores a version. ``keep``: the version before it becomes a past one. VersionConflictError."""
    row = versions.current(connection, document.namespace, document.id)
    _check_version(row, document.namespace, document.id, expected_version)
    before = row if row is not None and not row["deleted"] else None
    if before is not None and _is_same(before, document, gradient):
        return PutResult(to_stored(before), Outcome.UNCHANGED)
    sequence = _next_sequence(connection)
    new: dict[str, Any] = {
        "began": sequence,
        "key": sequence if row is None else row["key"],
        "namespace": document.namespace,
        "id": document.id,
        "version": 1 if row is None else row["version"] + 1,
        "deleted": False,
        "purged": False,
        "updated_us": time.time_ns() // 1000,
        "content_digest": document.content_digest,
        "gradient_digest": gradient.digest,
        "gradient_bytes": gradient.num_bytes,
        "num_tokens": gradient.num_tokens,
        "truncated": gradient.truncated,
        "num_text_bytes": len(document.text.encode()),
        "title": document.title,
        "metadata": json.dumps(dict(document.metadata), sort_keys=True),
        "embedding": gradient.embedding,
        "text": document.text,
    }
    if sentences is not None:
        sentence_rows.add(connection, sequence, sentences)
    if before is not None and not has_new_text(new, before):
        if sentences is None:
            sentence_rows.copy(connection, before["began"], sequence)
        next_rows.copy(connection, before["began"], sequence)
    dropped: frozenset[str] = frozenset()
    if before is not None:
        dropped = _supersede(connection, before, sequence, keep=keep)
    elif row is not None:
        versions.remove(connection, row)
    versions.add(connection, new)
    search_rows.put(connection, new, document.metadata, before)
    stored = StoredDocument(new["key"], document, gradient, new["version"], sequence, new["updated_us"])
    if before is None:
        return PutResult(stored, Outcome.CREATED)
    return PutResult(stored, Outcome.UPDATED, dropped - {gradient.digest})


def delete_document(
    connection: sa.Connection,
    search_rows: SearchRows,
    namespace: str,
    id: str,
    expected_version: int | None,
    *,
    keep: bool,
) -> DeleteResult:
    """Removes the content. ``keep``: it becomes a past version. NotFoundError, VersionConflictError."""
    row = versions.current(connection, namespace, id)
    if row is None or row["deleted"]:
        raise document_not_found(namespace, id)
    _check_version(row, namespace, id, expected_version)
    sequence = _next_sequence(connection)
    dropped = _supersede(connection, row, sequence, keep=keep)
    _add_deletion(connection, search_rows, row, sequence, purged=False)
    return DeleteResult(row["version"], sequence, dropped)


def purge_document(
    connection: sa.Connection, search_rows: SearchRows, namespace: str, id: str, expected_version: int | None
) -> DeleteResult:
    """Removes the content of a document, deleted or not, and of all its past versions.

    Horizons stay: ``as_of`` answers as if the document had never existed. A purge may be repeated with the same
    ``expected_version``, because its answer may have been lost. NotFoundError, VersionConflictError.
    """
    row = versions.current(connection, namespace, id)
    if row is None:
        raise document_not_found(namespace, id)
    if not (row["purged"] and expected_version == row["version"]):
        _check_version(row, namespace, id, expected_version)
    digests = versions.remove_past(connection, row["key"])
    sequence = row["began"]
    if row["deleted"]:
        versions.mark_purged(connection, row)
    else:
        sequence = _next_sequence(connection)
        digests |= versions.remove(connection, row)
        _add_deletion(connection, search_rows, row, sequence, purged=True)
    # A deleted document without past versions needs an erasure too: its words may still be in the catalog's files.
    return DeleteResult(row["version"], sequence, erasures.record(connection, row["key"], namespace, digests))


def _is_same(row: Row, document: Document, gradient: Gradient) -> bool:
    # The number of tokens differs if one gradient was uploaded and the other one was encoded here.
    stored = (row["content_digest"], row["gradient_digest"], row["embedding"], row["num_tokens"])
    return bool(stored == (document.content_digest, gradient.digest, gradient.embedding, gradient.num_tokens))


def _check_version(row: Row | None, namespace: str, id: str, expected: int | None) -> None:
    actual = row["version"] if row is not None and not row["deleted"] else 0
    if expected is not None and expected != actual:
        raise version_conflict(namespace, id, expected, actual)


def _next_sequence(connection: sa.Connection) -> int:
    (row,) = _NEXT_SEQUENCE.rows(connection)
    return int(row[0])


def _supersede(connection: sa.Connection, row: Row, sequence: int, *, keep: bool) -> frozenset[str]:
    """Ends a document's version with the change ``sequence``. ``keep``: keep it as a past version, or else drop it.
    Returns the digests of the gradients that it dropped."""
    if keep:
        versions.end(connection, row, sequence)
        return frozenset()
    move_horizon(connection, row["namespace"], sequence)
    return versions.remove(connection, row)


def _add_deletion(connection: sa.Connection, search_rows: SearchRows, row: Row, sequence: int, *, purged: bool) -> None:
    """Adds a deletion. ``row`` is the document's last version, which has ended."""
    named = {name: row[name] for name in ("key", "namespace", "id", "version")}
    changed = {"began": sequence, "updated_us": time.time_ns() // 1000, "purged": purged}
    versions.add(connection, {**named, **changed, **_WITHOUT_CONTENT})
    search_rows.remove(connection, row)
