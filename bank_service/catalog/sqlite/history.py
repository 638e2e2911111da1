"""Past versions of documents, for ``as_of``: what a query would have been answered at an earlier sequence number.

A version that is superseded or deleted goes to the table ``history`` in the transaction of that change, where the
bank keeps history at all. What it was at sequence s is then exact: the living documents that were last changed at s or
before, and the past versions that began at s or before and ended after it. Creations need no history.

Where a version is dropped instead, at once or when its time is over, its namespace's horizon moves to the sequence at
which it ended: from there on everything is known. Each namespace has its own, so that a change in one neither takes
another's past nor shows in it. A purged document moves none: it is as if it had never existed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from bank_service.catalog.entries import Candidate, Score
from bank_service.catalog.sqlite.prepared import Prepared
from bank_service.catalog.sqlite.rows import to_stored
from bank_service.catalog.sqlite.tables import documents, history, history_setting, horizons
from bank_service.values.documents import Gradient, Hit, StoredDocument
from bank_service.values.filters import Condition

logger = logging.getLogger(__name__)

MAX_SECONDS = 2**31  # longer than anything was kept
_INSERT = Prepared(sa.insert(history), [column.name for column in history.c])
_COPIED = [column.name for column in history.c if column.name in documents.c]


def seconds_kept(connection: sa.Connection, given: int | None) -> int:
    """How long past versions are kept: as ``given``, which is remembered, or as it was given last; at first, not.

    A catalog from before it was remembered may have past versions and not know until when they are to stay. Then all
    stay until somebody says it: what is kept too long can still be dropped.
    """
    known = connection.execute(sa.select(history_setting.c.seconds)).scalar_one_or_none()
    seconds = given if given is not None else known
    if seconds is None and connection.execute(sa.select(history.c.began).limit(1)).first() is not None:
        logger.warning("past versions stay until it is said how long: start the bank once with --history-seconds")
        return MAX_SECONDS
    seconds = seconds or 0
    if seconds != known:
        written = insert(history_setting).values(id=1, seconds=seconds)
        connection.execute(written.on_conflict_do_update(index_elements=["id"], set_={"seconds": seconds}))
    return seconds


def supersede(connection: sa.Connection, row: Mapping[str, Any], sequence: int, *, keep: bool) -> None:
    """The version in ``row`` of ``documents`` has ended with the change ``sequence``; it is kept or dropped."""
    if not keep:
        _move_horizon(connection, row["namespace"], sequence)
        return
    copied = {name: row[name] for name in _COPIED}
    ended = {"began": row["sequence"], "ended": sequence, "ended_us": time.time_ns() // 1000}
    _INSERT.run(connection, **copied, **ended)


def purge(connection: sa.Connection, key: int) -> set[str]:
    """Erases all past versions of a document; the gradients that they had. Empty where there were none."""
    gone = sa.delete(history).where(history.c.key == key).returning(history.c.gradient_digest)
    return set(connection.execute(gone).scalars())


def expire(connection: sa.Connection, before_us: int | None, limit: int) -> list[str] | None:
    """Drops up to ``limit`` versions that ended before a time (None: whenever); the gradients that they had.

    None where there are no more.
    """
    columns = history.c
    query = sa.select(columns.began, columns.namespace, columns.ended, columns.gradient_digest)
    if before_us is not None:
        query = query.where(columns.ended_us < before_us)
    rows = connection.execute(query.order_by(columns.ended_us).limit(limit)).all()
    if not rows:
        return None
    for namespace in {row.namespace for row in rows}:
        _move_horizon(connection, namespace, max(row.ended for row in rows if row.namespace == namespace))
    connection.execute(sa.delete(history).where(columns.began.in_([row.began for row in rows])))
    return sorted({row.gradient_digest for row in rows})


def replace_gradient(connection: sa.Connection, began: int, digest: str, gradient: Gradient) -> bool:
    """Gives a past version another gradient in the place of one that is lost; false where it has that no more."""
    changed = sa.update(history).where(history.c.began == began, history.c.gradient_digest == digest)
    values = {
        "gradient_digest": gradient.digest,
        "gradient_bytes": gradient.num_bytes,
        "num_tokens": gradient.num_tokens,
        "truncated": gradient.truncated,
    }
    return connection.execute(changed.values(**values)).rowcount == 1


def fill_horizons(connection: sa.Connection) -> None:
    """For a catalog that kept neither history nor horizons.

    What a document was before its last change is not known, unless that change created it.
    """
    query = sa.select(documents.c.namespace, sa.func.max(documents.c.sequence))
    changed = query.where(documents.c.deleted | (documents.c.version > 1)).group_by(documents.c.namespace)
    for namespace, sequence in connection.execute(changed).all():
        _move_horizon(connection, namespace, sequence)


def horizon(connection: sa.Connection, namespace: str) -> int:
    """The oldest sequence at which all that the namespace held is known."""
    query = sa.select(horizons.c.sequence).where(horizons.c.namespace == namespace)
    return int(connection.execute(query).scalar_one_or_none() or 0)


def candidates(
    connection: sa.Connection, namespace: str, as_of: int, conditions: Sequence[Condition], after: int, limit: int
) -> tuple[list[Candidate], int] | None:
    """See ``CatalogView.past_candidates``. Versions that end between two calls come later than those before."""
    columns = history.c
    query = (
        sa.select(
            columns.began,
            columns.id,
            columns.ended,
            columns.metadata,
            columns.embedding,
            columns.version,
            columns.gradient_digest,
            columns.gradient_bytes,
        )
        .where(columns.namespace == namespace, columns.ended > after, columns.began <= as_of)
        .order_by(columns.ended)
        .limit(limit)
    )
    rows = connection.execute(query).all()
    if not rows:
        return None
    matching = [row for row in rows if _matches(row.metadata, conditions)]
    found = [
        Candidate(row.began, row.id, row.began, row.embedding, row.version, row.gradient_digest, row.gradient_bytes)
        for row in matching
    ]
    return found, rows[-1].ended


def began(connection: sa.Connection, namespace: str, ids: Sequence[str], as_of: int) -> dict[str, int]:
    """id → where the version that it had at ``as_of`` began; without those that did not exist."""
    current, past = documents.c, history.c
    chosen = [current.namespace == namespace, current.id.in_(ids)]
    # Not by ``sequence`` in SQL: SQLite would go through the whole namespace in its order.
    living = sa.select(current.id, current.sequence).where(*chosen, sa.not_(current.deleted))
    found = {id: int(began) for id, began in connection.execute(living) if began <= as_of}
    ended = sa.select(past.id, past.began).where(
        past.key.in_(sa.select(current.key).where(*chosen)), past.began <= as_of, past.ended > as_of
    )
    return found | {id: int(began) for id, began in connection.execute(ended)}


def hits(connection: sa.Connection, scores: dict[int, Score], include_text: bool) -> list[Hit]:
    """A hit for each version in ``scores``, by where it began, in its order; without those that are not there."""
    found = {}
    for table, began in ((documents, documents.c.sequence), (history, history.c.began)):
        columns = [table.c.id, table.c.version, table.c.gradient_digest, table.c.gradient_bytes]
        if include_text:
            columns += [table.c.title, table.c.text]
        query = sa.select(began, *columns).where(began.in_(list(scores)))
        found.update({row[0]: row[1:] for row in connection.execute(query)})
    rows = [(found[key], score) for key, score in scores.items() if key in found]
    return [Hit(row[0], row[1], score.value, score.cosine, *row[2:]) for row, score in rows]


def owners(connection: sa.Connection, digest: str, limit: int) -> list[StoredDocument]:
    """Up to ``limit`` past versions that had this gradient; their sequences are where they began."""
    query = sa.select(history, history.c.began.label("sequence")).where(history.c.gradient_digest == digest)
    return [to_stored(row) for row in connection.execute(query.limit(limit)).mappings()]


def _move_horizon(connection: sa.Connection, namespace: str, sequence: int) -> None:
    moved = insert(horizons).values(namespace=namespace, sequence=sequence)
    farther = sa.func.max(horizons.c.sequence, moved.excluded.sequence)
    connection.execute(moved.on_conflict_do_update(index_elements=["namespace"], set_={"sequence": farther}))


def _matches(metadata: str, conditions: Sequence[Condition]) -> bool:
    pairs = json.loads(metadata) if conditions else {}
    return all(condition.holds(pairs) for condition in conditions)
