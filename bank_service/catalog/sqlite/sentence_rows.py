"""The vectors of versions' sentences. ``versions`` removes them together with their version."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sqlalchemy as sa

from bank_service.catalog.entries import SentenceVectors, VersionText
from bank_service.catalog.sqlite.prepared import Prepared, among, listed, run_text
from bank_service.catalog.sqlite.tables import sentence_vectors, versions

_S, _V = sentence_vectors.c, versions.c
_INSERT = Prepared(sa.insert(sentence_vectors), ["began", "places", "vectors"])
_COPY = (
    "INSERT INTO sentence_vectors (began, places, vectors) "
    "SELECT ?, places, vectors FROM sentence_vectors WHERE began = ?"
)
_REMOVE = Prepared(sa.delete(sentence_vectors).where(_S.began.in_(among("began"))))
_TEXTS = Prepared(
    sa.select(_V.began, _V.title, _V.text, _S.places, _S.vectors)
    .select_from(sa.outerjoin(versions, sentence_vectors, _V.began == _S.began))
    .where(_V.began.in_(among("began")), sa.not_(_V.deleted))
)
_LACKING = Prepared(
    sa.select(_V.began).where(
        _V.began == sa.bindparam("row"),
        sa.not_(_V.deleted),
        _V.began.not_in(sa.select(_S.began).where(_S.began == sa.bindparam("row"))),
    )
)


def add(connection: sa.Connection, began: int, sentences: SentenceVectors) -> None:
    _INSERT.run(connection, began=began, places=sentences.places, vectors=sentences.vectors)


def add_missing(connection: sa.Connection, began: int, sentences: SentenceVectors) -> bool:
    """See ``Catalog.put_sentences``."""
    is_missing = bool(_LACKING.rows(connection, row=began))
    if is_missing:
        add(connection, began, sentences)
    return is_missing


def copy(connection: sa.Connection, began: int, new: int) -> None:
    """Gives the vectors of a version to another one, too."""
    run_text(connection, _COPY, (new, began))


def remove(connection: sa.Connection, began: Collection[int]) -> None:
    _REMOVE.run(connection, began=listed(began))


def texts(connection: sa.Connection, began: Sequence[int]) -> dict[int, VersionText]:
    """See ``CatalogView.texts``."""
    return {
        row[0]: VersionText(row[1], row[2], None if row[3] is None else SentenceVectors(row[3], row[4]))
        for row in _TEXTS.rows(connection, began=listed(began))
    }
