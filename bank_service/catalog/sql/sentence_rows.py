"""The vectors of versions' sentences. ``versions`` removes them together with their version."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sqlalchemy as sa

from bank_service.catalog.entries import SentenceVectors, VersionText
from bank_service.catalog.sql.prepared import Prepared, among, listed
from bank_service.catalog.sql.quota import NUM_SENTENCE_BYTES, count
from bank_service.catalog.sql.tables import sentence_vectors, versions

_S, _V = sentence_vectors.c, versions.c
_INSERT = Prepared(sa.insert(sentence_vectors), ["began", "places", "vectors"])
_COPY = Prepared(
    sa.insert(sentence_vectors).from_select(
        ["began", "places", "vectors"],
        sa.select(sa.bindparam("new", type_=sa.BigInteger), _S.places, _S.vectors).where(
            _S.began == sa.bindparam("old")
        ),
    )
)
_REMOVE = Prepared(sa.delete(sentence_vectors).where(_S.began.in_(among("began", sa.BigInteger))))
_TEXTS = Prepared(
    sa.select(_V.began, _V.title, _V.text, _S.places, _S.vectors)
    .select_from(sa.outerjoin(versions, sentence_vectors, _V.began == _S.began))
    .where(_V.began.in_(among("began", sa.BigInteger)), sa.not_(_V.deleted))
)
_NUM_BYTES = Prepared(sa.select(NUM_SENTENCE_BYTES).where(_S.began == sa.bindparam("row")))
_LACKING = Prepared(
    sa.select(_V.namespace).where(
        _V.began == sa.bindparam("row"),
        sa.not_(_V.deleted),
        _V.began.not_in(sa.select(_S.began).where(_S.began == sa.bindparam("row"))),
    )
)


def add(connection: sa.Connection, began: int, sentences: SentenceVectors) -> None:
    _INSERT.run(connection, began=began, places=sentences.places, vectors=sentences.vectors)


def add_missing(connection: sa.Connection, began: int, sentences: SentenceVectors) -> bool:
    """See ``Catalog.put_sentences``."""
    lacking = _LACKING.rows(connection, row=began)
    for (namespace,) in lacking:
        add(connection, began, sentences)
        count(connection, namespace, num_documents=0, num_bytes=sentences.num_bytes)
    return bool(lacking)


def copy(connection: sa.Connection, began: int, new: int) -> None:
    """Gives the vectors of a version to another one, too."""
    _COPY.run(connection, new=new, old=began)


def remove(connection: sa.Connection, began: Collection[int]) -> None:
    _REMOVE.run(connection, began=listed(began))


def num_bytes(connection: sa.Connection, began: int) -> int:
    """0 for a version without vectors."""
    return sum(size for (size,) in _NUM_BYTES.rows(connection, row=began))


def texts(connection: sa.Connection, began: Sequence[int]) -> dict[int, VersionText]:
    """See ``CatalogView.texts``."""
    return {
        row[0]: VersionText(row[1], row[2], None if row[3] is None else SentenceVectors(row[3], row[4]))
        for row in _TEXTS.rows(connection, began=listed(began))
    }
