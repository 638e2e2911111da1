"""The documents that answer a text best by BM25, without scoring all that have a word of it.

FTS5 scores every document that has any of the words, and the common words of a text stand in a large part of a
namespace. But a word adds at most (k1 + 1) · idf to a score, little for a common one. So the **essential** words are
found, the rarest, so many that documents with none of them can't reach the best ``count``; only documents with an
essential word are scored, by all words. Nothing is missed by it: MaxScore (Turtle and Flood, 1995) with a query's words
as the lists. Where that would leave few out, all are scored.

Scores are rounded: in which order a sum is taken must not decide between documents that are equally good.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from bank_service.catalog.sqlite.attributes import holds
from bank_service.catalog.sqlite.lexical import table_of
from bank_service.catalog.sqlite.prepared import Prepared, among, listed, run_text
from bank_service.catalog.sqlite.quota import usage
from bank_service.catalog.sqlite.tables import now, versions
from bank_service.values.filters import Condition

MAX_WORDS = 128  # different words of a query that count; each is a list of documents to go through
WORTHWHILE = 0.25  # of all the lists' entries: where more documents would be scored all the same, all are
SPARE = 64  # scored more than asked for, to see whether the last ones are equally good as others left out
_SATURATION = 2.2  # k1 + 1 of FTS5's BM25: the most by which a word's count multiplies its idf
_LEAST_IDF = 1e-6  # FTS5's, of a word that half of the documents have
_DIGITS = 9  # of a score, behind the point; FTS5's sums are right to about 14
_ROUNDING = 10.0**-_DIGITS
_WORD = re.compile(r"\w+")

_IDS = Prepared(sa.select(versions.c.key, versions.c.id).where(versions.c.key.in_(among("keys")), now))


@dataclass(frozen=True, slots=True)
class _Word:
    quoted: str  # for FTS5's MATCH; none can be an operator
    num_documents: int
    bound: float  # no document's score has more of it


def best_words(
    connection: sa.Connection, namespace: str, text: str, conditions: Sequence[Condition], count: int
) -> dict[int, float]:
    """key → BM25 of up to ``count`` documents that have a word of ``text`` and match, best first, ties by id."""
    table = table_of(connection, namespace)
    words = [] if table is None else _words(connection, table, namespace, text)
    if table is None or not words:
        return {}
    num_essential = _guess(words, count)
    while True:
        if _postings(words[:num_essential]) > WORTHWHILE * _postings(words):
            num_essential = len(words)
        found = _Search(connection, table, words, num_essential, conditions).best(count)
        # Documents that are as good as the last one may be among those that were not scored.
        least = min(found.values()) - 2 * _ROUNDING if len(found) == count else 0.0
        needed = _needed(words, least)
        if needed <= num_essential:
            return found
        num_essential = needed


def _words(connection: sa.Connection, table: str, namespace: str, text: str) -> list[_Word]:
    """Those of a user's text that a document has, the rarest first."""
    total = usage(connection, namespace).num_documents
    words: list[_Word] = []
    for text_word in list(dict.fromkeys(match[0].lower() for match in _WORD.finditer(text)))[:MAX_WORDS]:
        quoted = f'"{text_word}"'
        counted = f"SELECT count(*) FROM {table} WHERE {table} MATCH ?"
        ((number,),) = run_text(connection, counted, (quoted,))
        if number:
            # As FTS5 has it, in which a word of more than half of the documents would have none or less.
            idf = max(math.log((total - number + 0.5) / (number + 0.5)), _LEAST_IDF)
            words.append(_Word(quoted, number, _SATURATION * idf))
    return sorted(words, key=lambda word: word.num_documents)


def _needed(words: Sequence[_Word], least: float) -> int:
    """How many of the rarest words are essential, where a document must have at least this score."""
    return next((n for n in range(len(words)) if sum(word.bound for word in words[n:]) < least), len(words))


def _guess(words: Sequence[_Word], count: int) -> int:
    """So many that ``count`` documents have one, and as if the last of these had nothing else, and that once in a text
    of mean length: a guess that saves a second look, no more."""
    reached = 0
    for index, word in enumerate(words, 1):
        reached += word.num_documents
        if reached >= count:
            return max(index, _needed(words, word.bound / _SATURATION))
    return len(words)


def _postings(words: Sequence[_Word]) -> int:
    return sum(word.num_documents for word in words)


class _Search:
    """The documents that match and have one of the first ``num_essential`` words, scored by all."""

    def __init__(
        self,
        connection: sa.Connection,
        table: str,
        words: Sequence[_Word],
        num_essential: int,
        conditions: Sequence[Condition],
    ) -> None:
        self._connection = connection
        self._found = sa.table(table, sa.column("rowid"), sa.column(table))
        must, may = ([word.quoted for word in part] for part in (words[:num_essential], words[num_essential:]))
        expression, times = " OR ".join(must), 1
        if may:
            # FTS5 scores by all that stands in an expression, as often as it stands there, and has nothing that counts
            # and need not be there. So what must be there counts twice, and with it all else.
            expression, times = f"({' OR '.join([*must, *may, *may])}) AND ({expression})", 2
        score: sa.Label[float] = sa.literal_column(f"round(-bm25({table}) / {times}, {_DIGITS})").label("score")
        self._scored = (
            sa.select(self._found.c.rowid, score)
            .where(sa.literal_column(table).op("MATCH")(expression))
            .where(*(holds(condition, self._found.c.rowid) for condition in conditions))
            .order_by(score.desc())
        )

    def best(self, count: int) -> dict[int, float]:
        """key → score of the ``count`` best, ties by id."""
        rows = self._connection.execute(self._scored.limit(count + SPARE)).all()
        if len(rows) == count + SPARE and rows[-1].score == rows[count - 1].score:
            # So many are equal that ids must be compared of more than were read: with the documents' rows, slower.
            joined = self._scored.join_from(self._found, versions, sa.and_(versions.c.key == self._found.c.rowid, now))
            rows = self._connection.execute(joined.order_by(versions.c.id).limit(count)).all()
        keys = [int(row.rowid) for row in rows]
        ids = dict(_IDS.rows(self._connection, keys=listed(keys)))
        ordered = sorted(rows, key=lambda row: (-row.score, ids[row.rowid]))
        return {int(row.rowid): float(row.score) for row in ordered[:count]}
