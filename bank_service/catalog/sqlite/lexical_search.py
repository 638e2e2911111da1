"""Scores documents by BM25 with FTS5; ``sql.max_score`` says which ones. FTS5 has k1 = 1.2 and b = 0.75."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from bank_service.catalog.sql.max_score import DIGITS, Word, best_documents, searched_words, weighed
from bank_service.catalog.sql.prepared import Prepared, among, listed, run_text
from bank_service.catalog.sql.quota import usage
from bank_service.catalog.sql.tables import now, versions
from bank_service.catalog.sqlite.attributes import holds
from bank_service.catalog.sqlite.lexical import table_of
from bank_service.values.filters import Condition

SPARE = 64  # documents read beyond ``count``, to see ties at the end

_IDS = Prepared(sa.select(versions.c.key, versions.c.id).where(versions.c.key.in_(among("keys", sa.BigInteger)), now))


def best_words(
    connection: sa.Connection, namespace: str, text: str, conditions: Sequence[Condition], count: int
) -> dict[int, float]:
    """key → BM25 of up to ``count`` documents that have a word of ``text`` and match, best first, ties by id."""
    table = table_of(connection, namespace)
    if table is None:
        return {}
    numbers = {word: _num_documents(connection, table, word) for word in searched_words(text)}
    words = weighed(numbers, usage(connection, namespace).num_documents)
    return best_documents(words, count, lambda num: _Search(connection, table, words, num, conditions).best(count))


def _num_documents(connection: sa.Connection, table: str, word: str) -> int:
    ((number,),) = run_text(connection, f"SELECT count(*) FROM {table} WHERE {table} MATCH ?", (_quoted(word),))
    return int(number)


def _quoted(word: str) -> str:
    """For FTS5's MATCH, which takes no quoted word for an operator."""
    return f'"{word}"'


class _Search:
    """The matching documents that have one of the first ``num_essential`` words, scored by all words."""

    def __init__(
        self,
        connection: sa.Connection,
        table: str,
        words: Sequence[Word],
        num_essential: int,
        conditions: Sequence[Condition],
    ) -> None:
        self._connection = connection
        self._found = sa.table(table, sa.column("rowid"), sa.column(table))
        must, may = ([_quoted(word.text) for word in part] for part in (words[:num_essential], words[num_essential:]))
        expression, times = " OR ".join(must), 1
        if may:
            # FTS5 scores by every word of the expression, as often as it occurs there. It has no optional words. The
            # expression names the essential words twice: once as a requirement. So it also names the others twice, and
            # the score is halved.
            expression, times = f"({' OR '.join([*must, *may, *may])}) AND ({expression})", 2
        score: sa.Label[float] = sa.literal_column(f"round(-bm25({table}) / {times}, {DIGITS})").label("score")
        self._scored = (
            sa.select(self._found.c.rowid, score)
            .where(sa.literal_column(table).op("MATCH")(expression))
            .where(*(holds(condition, self._found.c.rowid) for condition in conditions))
            .order_by(score.desc())
        )

    def best(self, count: int) -> dict[int, float]:
        """key → score of the best ``count`` documents, best first, ties by id."""
        rows = self._connection.execute(self._scored.limit(count + SPARE)).all()
        if len(rows) == count + SPARE and rows[-1].score == rows[count - 1].score:
            # More documents tie than were read, so SQLite must sort them by id. This join with their rows is slower.
            joined = self._scored.join_from(self._found, versions, sa.and_(versions.c.key == self._found.c.rowid, now))
            rows = self._connection.execute(joined.order_by(versions.c.id).limit(count)).all()
        keys = [int(row.rowid) for row in rows]
        ids = dict(_IDS.rows(self._connection, keys=listed(keys)))
        ordered = sorted(rows, key=lambda row: (-row.score, ids[row.rowid]))
        return {int(row.rowid): float(row.score) for row in ordered[:count]}
