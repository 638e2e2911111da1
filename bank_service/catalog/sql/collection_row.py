"""The collection's own row, with the properties that all its gradients and embeddings share."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict

import sqlalchemy as sa

from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.sql import next_rows
from bank_service.catalog.sql.tables import collection, recoding
from bank_service.errors import BankInUseError, CollectionMismatchError

# Schema 1 had no tables for filters and lexical retrieval, and 2 had none for past versions. Schema 3 had an index of
# digests only. Up to 4, documents and past versions had separate tables, and triggers counted the usage. Up to 5, FTS5
# made the words. Up to 6, sentences had no vectors. Such a version gets them when they are first needed. In 7 they were
# no part of the usage. Up to 8, a collection had no next learner. PostgreSQL has had catalogs since 9.
#
# Every start makes the tables that it lacks. So a new table needs no other number, if the program gets along without
# the rows of older nodes, which go on beside it. Any other change does, and is made by a node that is alone.
SCHEMA_VERSION = 9

_REMEDIES = {
    "learner_fingerprint": "name the folder of that learner with --learner; `regrad upgrade` then changes it",
    "codec": "name that codec with --codec; `regrad recode` then changes it",
}


def open_collection(
    connection: sa.Connection,
    identity: CollectionIdentity,
    place: str,
    *,
    check_new: Callable[[], None],
    upgrade: Callable[[int], sa.RowMapping],
    is_alone: bool = True,
) -> str:
    """Begins the collection, or compares it with ``identity``. Returns its id. All tables must exist.

    ``place`` is for errors. ``check_new`` raises where no collection may begin. ``upgrade`` changes a schema of an
    older version and returns the collection's row. CollectionMismatchError; then roll back what was done. Without
    ``is_alone``, other processes have the collection open and couldn't follow a change: BankInUseError.
    """
    wanted = asdict(identity)
    row = connection.execute(sa.select(collection)).mappings().one_or_none()
    if row is None:
        check_new()
        # The id stays the same when the content changes.
        created = {"id": 1, "schema_version": SCHEMA_VERSION, "sequence": 0, "uuid": secrets.token_hex(16)}
        connection.execute(sa.insert(collection).values(**created, **wanted))
        return str(created["uuid"])
    check_known(row["schema_version"], place)
    if not is_alone:
        _check_settled(connection, row, place)
    if row["schema_version"] < SCHEMA_VERSION:
        row = upgrade(row["schema_version"])
    known = next_rows.learner(connection)
    if known is not None and known.fingerprint == identity.learner_fingerprint and next_rows.finish(connection):
        row = connection.execute(sa.select(collection)).mappings().one()
    for name, value in {"schema_version": SCHEMA_VERSION, **wanted}.items():
        if row[name] != value:
            remedy = _REMEDIES.get(name, "use another data directory")
            raise CollectionMismatchError(
                f"{name} of the collection in {place} must be {row[name]}, got {value}; {remedy}"
            )
    return str(row["uuid"])


def check_known(schema_version: int, place: str) -> None:
    """CollectionMismatchError for the schema of a newer version of the bank."""
    if schema_version > SCHEMA_VERSION:
        raise CollectionMismatchError(
            f"the catalog in {place} must have schema {SCHEMA_VERSION} or an older one, got {schema_version} of a "
            "newer version of the bank; start that version, or restore a backup from before its upgrade"
        )


def _check_settled(connection: sa.Connection, row: sa.RowMapping, place: str) -> None:
    if row["schema_version"] < SCHEMA_VERSION:
        raise BankInUseError(
            f"the catalog in {place} must get schema {SCHEMA_VERSION} by a node that is alone, it has "
            f"{row['schema_version']} and other nodes; stop them, start this one, then start them with its version"
        )
    for is_under_way, what in (
        (connection.execute(sa.select(recoding)).first() is not None, "another codec"),
        (next_rows.learner(connection) is not None, "another learner"),
    ):
        if is_under_way:
            raise BankInUseError(
                f"the collection is on its way to {what}, and other nodes have it open; start this one when that is "
                "done, or stop the others"
            )
