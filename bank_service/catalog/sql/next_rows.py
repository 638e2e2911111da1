"""The gradients of the next learner, beside those of the collection's learner. ``versions`` removes them together with
their version."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sqlalchemy as sa

from bank_service.catalog.entries import NextLearner
from bank_service.catalog.sql.prepared import Prepared, among, listed
from bank_service.catalog.sql.quota import count_anew
from bank_service.catalog.sql.tables import (
    collection,
    namespace_usage,
    next_gradients,
    next_learner,
    past,
    recoding,
    versions,
)
from bank_service.errors import UnavailableError
from bank_service.values.documents import Gradient

_N, _V = next_gradients.c, versions.c
_VALUES = ("gradient_digest", "gradient_bytes", "num_tokens", "truncated")
_OWN = Prepared(
    sa.select(_V.began, _V.gradient_digest, _V.gradient_bytes).where(_V.began.in_(among("began", sa.BigInteger)))
)
_NEXT = Prepared(
    sa.select(_N.began, _N.gradient_digest, _N.gradient_bytes).where(_N.began.in_(among("began", sa.BigInteger)))
)
_SIZES = Prepared(
    sa.select(_N.gradient_digest, _N.gradient_bytes).where(_N.gradient_digest.in_(among("digests"))).distinct()
)
_NAMESPACES = Prepared(
    sa.select(_N.gradient_digest, _V.namespace)
    .join_from(next_gradients, versions, _N.began == _V.began)
    .where(_N.gradient_digest.in_(among("digests")))
)
_REMOVE = Prepared(
    sa.delete(next_gradients).where(_N.began.in_(among("began", sa.BigInteger))).returning(_N.gradient_digest)
)
_LEARNER = Prepared(sa.select(next_learner.c.learner_fingerprint, next_learner.c.layout_id, next_learner.c.folder))
_COLLECTION = Prepared(sa.select(collection.c.learner_fingerprint))
_LIVES = Prepared(sa.select(_V.began).where(_V.began == sa.bindparam("row"), sa.not_(_V.deleted)))
_INSERT = Prepared(sa.insert(next_gradients), ["began", *_VALUES])
_COPY = Prepared(
    sa.insert(next_gradients).from_select(
        ["began", *_VALUES],
        sa.select(sa.bindparam("new", type_=sa.BigInteger), *(_N[name] for name in _VALUES)).where(
            _N.began == sa.bindparam("old")
        ),
    )
)
_WITHOUT = sa.not_(_V.deleted), ~sa.exists().where(_N.began == _V.began)


def learner(connection: sa.Connection) -> NextLearner | None:
    """See ``CatalogView.next_learner``."""
    rows = _LEARNER.rows(connection)
    return NextLearner(*rows[0]) if rows else None


def named(connection: sa.Connection, fingerprint: str, began: Sequence[int]) -> dict[int, tuple[str, int]] | None:
    """See ``CatalogView.gradients_of``."""
    ((own,),) = _COLLECTION.rows(connection)
    other = learner(connection)
    if fingerprint == own:
        rows = _OWN
    elif other is not None and fingerprint == other.fingerprint:
        rows = _NEXT
    else:
        return None
    return {row[0]: (row[1], row[2]) for row in rows.rows(connection, began=listed(began)) if row[1] is not None}


def lacking(connection: sa.Connection, after: int, limit: int) -> list[int]:
    """See ``CatalogView.lacking_next``."""
    query = sa.select(_V.began).where(_V.began > after, *_WITHOUT).order_by(_V.began).limit(limit)
    return list(connection.execute(query).scalars())


def number(connection: sa.Connection) -> tuple[int, int]:
    """See ``CatalogView.num_next``."""
    num_present = sa.select(sa.func.coalesce(sa.func.sum(namespace_usage.c.num_documents), 0)).scalar_subquery()
    num_past = sa.select(sa.func.count()).select_from(versions).where(past).scalar_subquery()
    num_done = sa.select(sa.func.count()).select_from(next_gradients).scalar_subquery()
    num_versions, done = connection.execute(sa.select(num_present + num_past, num_done)).one()
    return int(num_versions), int(done)


def owners(connection: sa.Connection, digest: str, limit: int) -> list[int]:
    """See ``CatalogView.next_owners``."""
    return list(connection.execute(sa.select(_N.began).where(_N.gradient_digest == digest).limit(limit)).scalars())


def sizes(connection: sa.Connection, digests: str) -> dict[str, int]:
    """digest → bytes. ``digests``: made by ``listed``."""
    return dict(_SIZES.rows(connection, digests=digests))


def namespaces(connection: sa.Connection, digests: str) -> list[tuple[str, str]]:
    """(digest, namespace). ``digests``: made by ``listed``."""
    return [(digest, namespace) for digest, namespace in _NAMESPACES.rows(connection, digests=digests)]


def page(connection: sa.Connection, after_digest: str, limit: int) -> dict[str, int]:
    """The next ``limit`` gradients in order of digest: digest → bytes."""
    chosen = sa.select(_N.gradient_digest, _N.gradient_bytes).where(after_digest < _N.gradient_digest).distinct()
    return {row[0]: row[1] for row in connection.execute(chosen.order_by(_N.gradient_digest).limit(limit))}


def begin(connection: sa.Connection, given: NextLearner) -> None:
    """See ``Catalog.begin_next``."""
    if connection.execute(sa.select(recoding)).first() is not None:
        raise UnavailableError("the collection is being recoded; try again when that is done")
    drop(connection)
    connection.execute(
        sa.insert(next_learner).values(
            id=1, learner_fingerprint=given.fingerprint, layout_id=given.layout_id, folder=given.folder
        )
    )


def put(connection: sa.Connection, fingerprint: str, began: int, gradient: Gradient) -> set[str]:
    """See ``Catalog.put_next``."""
    known = learner(connection)
    if known is None or known.fingerprint != fingerprint or not _LIVES.rows(connection, row=began):
        return {gradient.digest}
    replaced = set(remove(connection, [began]))
    values = (gradient.digest, gradient.num_bytes, gradient.num_tokens, gradient.truncated)
    _INSERT.run(connection, began=began, **dict(zip(_VALUES, values, strict=True)))
    return replaced - {gradient.digest}


def copy(connection: sa.Connection, began: int, new: int) -> None:
    """Gives the gradient of a version to another one of the same text, too."""
    _COPY.run(connection, new=new, old=began)


def remove(connection: sa.Connection, began: Collection[int]) -> list[str]:
    """Removes the gradients of these versions. Returns their digests."""
    return [digest for (digest,) in _REMOVE.rows(connection, began=listed(began))]


def drop(connection: sa.Connection) -> None:
    """See ``Catalog.drop_next``."""
    connection.execute(sa.delete(next_gradients))
    connection.execute(sa.delete(next_learner))


def finish(connection: sa.Connection) -> bool:
    """See ``Catalog.finish_next``."""
    known = learner(connection)
    if known is None or lacking(connection, 0, 1):
        return False
    columns = [_V[name] for name in _VALUES]
    values = sa.select(*(_N[name] for name in _VALUES)).where(_N.began == _V.began).scalar_subquery()
    connection.execute(sa.update(versions).where(sa.not_(_V.deleted)).values({sa.tuple_(*columns): values}))
    connection.execute(sa.update(collection).values(learner_fingerprint=known.fingerprint, layout_id=known.layout_id))
    drop(connection)
    count_anew(connection)
    return True
