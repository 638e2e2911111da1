"""The catalog's writes of one document, each one operation of ``GroupCommit``: whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.entries import DeleteResult
from bank_service.catalog.failures import document_not_found, version_conflict
from bank_service.catalog.sqlite import erasures, history
from bank_service.catalog.sqlite.attributes import put_attributes, remove_attributes
from bank_service.catalog.sqlite.lexical import put_words, remove_words
from bank_service.catalog.sqlite.prepared import Prepared
from bank_service.catalog.sqlite.rows import to_stored
from bank_service.catalog.sqlite.tables import collection, documents
from bank_service.values.documents import Document, Gradient, Outcome, PutResult, StoredDocument

_CURRENT = Prepared(
    sa.select(documents).where(documents.c.namespace == sa.bindparam("namespace"), documents.c.id == sa.bindparam("id"))
)
_NEXT_SEQUENCE = Prepared(
    sa.update(collection).values(sequence=collection.c.sequence + 1).returning(collection.c.sequence)
)
_INSERT = Prepared(
    sa.insert(documents).returning(documents.c.key),
    [column.name for column in documents.c if column.name != "key"],
)
_OF_ROW = sa.update(documents).where(documents.c.key == sa.bindparam("row_key"))
_REPLACE = Prepared(_OF_ROW, [column.name for column in documents.c if column.name not in ("key", "namespace", "id")])
_EMPTIED: dict[str, Any] = {
    "deleted": True,
    "title": "",
    "text": "",
    "num_text_bytes": 0,
    "metadata": "{}",
    "content_digest": None,
    "gradient_digest": None,
    "gradient_bytes": 0,
    "embedding": None,
}
_EMPTY = Prepared(_OF_ROW, [*_EMPTIED, "sequence", "updated_us"])


def put_document(
    connection: sa.Connection, document: Document, gradient: Gradient, expected_version: int | None, *, keep: bool
) -> PutResult:
    """Stores a version. ``keep``: of the one that it supersedes. VersionConflictError."""
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
        (created,) = _INSERT.rows(connection, namespace=document.namespace, id=document.id, **values)
        key = int(created[0])
    else:
        key = row["key"]
        _REPLACE.run(connection, row_key=key, **values)
        remove_attributes(connection, key)
    if row is not None and alive:
        history.supersede(connection, row, values["sequence"], keep=keep)
    put_attributes(connection, key, document.namespace, document.metadata)
    if row is None or not alive or (row["title"], row["text"]) != (document.title, document.text):
        if row is not None and alive:
            remove_words(connection, row["key"], document.namespace, row["title"], row["text"])
        put_words(connection, key, document.namespace, document.title, document.text)
    outcome = Outcome.UPDATED if alive else Outcome.CREATED
    stored = StoredDocument(key, document, gradient, values["version"], values["sequence"], values["updated_us"])
    return PutResult(stored, outcome, replaced if replaced != gradient.digest else None)


def delete_document(
    connection: sa.Connection, namespace: str, id: str, expected_version: int | None, *, keep: bool
) -> DeleteResult:
    """Takes the content out. ``keep``: into the history. NotFoundError, VersionConflictError."""
    row = _current(connection, namespace, id)
    if row is None or row["deleted"]:
        raise document_not_found(namespace, id)
    _check_version(row, namespace, id, expected_version)
    sequence = _empty(connection, row)
    history.supersede(connection, row, sequence, keep=keep)
    return DeleteResult(row["version"], sequence, frozenset([row["gradient_digest"]]))


def purge_document(connection: sa.Connection, namespace: str, id: str, expected_version: int | None) -> DeleteResult:
    """Takes the content out, and that of all past versions; of a deleted document, that alone. NotFoundError,
    VersionConflictError. Horizons stay: ``as_of`` answers as if the document had never existed.

    A purge that was not acknowledged may come again, with the version that it expected.
    """
    row = _current(connection, namespace, id)
    if row is None:
        raise document_not_found(namespace, id)
    digests = history.purge(connection, row["key"])
    unfinished = erasures.unacknowledged(connection, row["key"])
    # Also of one that was deleted and has no past: its words may still stand in the catalog's files.
    if not row["deleted"] or unfinished is None or expected_version != row["version"]:
        _check_version(row, namespace, id, expected_version)
    digests |= unfinished or set()
    sequence = row["sequence"]
    if not row["deleted"]:
        digests.add(row["gradient_digest"])
        sequence = _empty(connection, row)
    erasure = erasures.record(connection, row["key"], namespace, digests)
    return DeleteResult(row["version"], sequence, frozenset(digests), erasure)


def _current(connection: sa.Connection, namespace: str, id: str) -> Mapping[str, Any] | None:
    return _CURRENT.one(connection, namespace=namespace, id=id)


def _check_version(row: Mapping[str, Any] | None, namespace: str, id: str, expected: int | None) -> None:
    actual = row["version"] if row is not None and not row["deleted"] else 0
    if expected is not None and expected != actual:
        raise version_conflict(namespace, id, expected, actual)


def _next_sequence(connection: sa.Connection) -> int:
    (row,) = _NEXT_SEQUENCE.rows(connection)
    return int(row[0])


def _empty(connection: sa.Connection, row: Mapping[str, Any]) -> int:
    """Takes the content out of a living document's row; the sequence of the change."""
    sequence = _next_sequence(connection)
    changed = {"sequence": sequence, "updated_us": time.time_ns() // 1000}
    _EMPTY.run(connection, row_key=row["key"], **changed, **_EMPTIED)
    remove_attributes(connection, row["key"])
    remove_words(connection, row["key"], row["namespace"], row["title"], row["text"])
    return sequence
