"""Past versions of documents, for ``as_of``: a query's answer at an earlier sequence number.

If the bank keeps history, a replaced or deleted version stays in the catalog, with its end. Then the state at any
sequence is known exactly.

A version may be dropped instead, at once or when its time is over. Then its namespace's horizon moves to the sequence
at which it ended. From the horizon on, every state is known. Each namespace has its own horizon, so its past does not
depend on other namespaces. A purge moves no horizon: the past is as if the document had never existed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.entries import Candidate
from bank_service.catalog.sql.prepared import Prepared, among, listed
from bank_service.catalog.sql.tables import history_setting, horizons, now, past, versions
from bank_service.errors import BankInUseError
from bank_service.values.filters import Condition

logger = logging.getLogger(__name__)


def _named(*columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """Columns of the present version of each id, null where there is none. With this join, SQLite looks each id up in
    the index. In all other ways it would read all of the namespace."""
    ids = among("ids").subquery()
    own = sa.and_(versions.c.id == ids.c.value, versions.c.namespace == sa.bindparam("namespace"), now)
    return sa.select(*columns).select_from(sa.outerjoin(ids, versions, own))


_PRESENT = Prepared(_named(versions.c.id, versions.c.began, versions.c.deleted))
_ENDED = Prepared(
    sa.select(versions.c.id, versions.c.began).where(
        versions.c.key.in_(_named(versions.c.key)), versions.c.ended > sa.bindparam("as_of")
    )
)
_HORIZON = Prepared(sa.select(horizons.c.sequence).where(horizons.c.namespace == sa.bindparam("space")))
_BEGIN_HORIZON = Prepared(sa.insert(horizons), ["namespace", "sequence"])
_MOVE_HORIZON = Prepared(sa.update(horizons).where(horizons.c.namespace == sa.bindparam("space")), ["sequence"])
MAX_SECONDS = 2**31  # 68 years: keeps everything


def seconds_kept(connection: sa.Connection, given: int | None, *, is_alone: bool = True) -> int:
    """The time for which past versions are kept. Stores ``given``; None reads the stored value, which is 0 at first.

    Without ``is_alone``, other processes know the stored value: BankInUseError for another one.

    A catalog of an older schema may have past versions but no stored value. Then it keeps all past versions until a
    value is given, because a dropped version can't be brought back.
    """
    known = connection.execute(sa.select(history_setting.c.seconds)).scalar_one_or_none()
    seconds = given if given is not None else known
    if seconds is None and connection.execute(sa.select(versions.c.began).where(past).limit(1)).first() is not None:
        logger.warning("the bank keeps all past versions until it is started once with --history-seconds")
        return MAX_SECONDS
    seconds = seconds or 0
    if seconds != known:
        if not is_alone:
            raise BankInUseError(
                f"history_seconds must be {known or 0} as on the other nodes of this catalog, got {seconds}; leave "
                "--history-seconds out, or stop the others to change it"
            )
        connection.execute(sa.delete(history_setting))
        connection.execute(sa.insert(history_setting).values(id=1, seconds=seconds))
    return seconds


def move_horizon(connection: sa.Connection, namespace: str, sequence: int) -> None:
    """The namespace's past before ``sequence`` is no longer known."""
    known = _HORIZON.rows(connection, space=namespace)
    if not known:
        _BEGIN_HORIZON.run(connection, namespace=namespace, sequence=sequence)
    elif known[0][0] < sequence:
        _MOVE_HORIZON.run(connection, space=namespace, sequence=sequence)


def fill_horizons(connection: sa.Connection) -> None:
    """For a catalog that kept neither history nor horizons.

    A namespace's horizon is the last change that ended a version, because that version is lost. Creations end none.
    """
    columns = versions.c
    query = sa.select(columns.namespace, sa.func.max(columns.began))
    changed = query.where(now, columns.deleted | (columns.version > 1)).group_by(columns.namespace)
    for namespace, sequence in connection.execute(changed).all():
        move_horizon(connection, namespace, sequence)


def horizon(connection: sa.Connection, namespace: str) -> int:
    """See ``CatalogView.horizon``."""
    known = _HORIZON.rows(connection, space=namespace)
    return int(known[0][0]) if known else 0


def candidates(
    connection: sa.Connection, namespace: str, as_of: int, conditions: Sequence[Condition], after: int, limit: int
) -> tuple[list[Candidate], int] | None:
    """See ``CatalogView.past_candidates``. A version that ends between two calls appears in a later call."""
    columns = versions.c
    query = (
        sa.select(
            columns.key,
            columns.id,
            columns.began,
            columns.embedding,
            columns.version,
            columns.gradient_digest,
            columns.gradient_bytes,
            columns.ended,
            columns.metadata,
        )
        .where(columns.namespace == namespace, columns.ended > after, columns.began <= as_of)
        .order_by(columns.ended)
        .limit(limit)
    )
    rows = connection.execute(query).all()
    if not rows:
        return None
    return [Candidate(*row[:7]) for row in rows if _matches(row.metadata, conditions)], rows[-1].ended


def began(connection: sa.Connection, namespace: str, ids: Sequence[str], as_of: int | None) -> dict[str, int]:
    """See ``CatalogView.began``."""
    named = listed(ids)
    rows = _PRESENT.rows(connection, namespace=namespace, ids=named)
    found = [(id, sequence) for id, sequence, deleted in rows if id is not None and not deleted]
    if as_of is None:
        return dict(found)
    found += _ENDED.rows(connection, namespace=namespace, ids=named, as_of=as_of)
    # Compared here, not in SQL: with ``began`` in the query, SQLite would scan the whole table in its order.
    return {id: sequence for id, sequence in found if sequence <= as_of}


def _matches(metadata: str, conditions: Sequence[Condition]) -> bool:
    pairs = json.loads(metadata) if conditions else {}
    return all(condition.holds(pairs) for condition in conditions)
