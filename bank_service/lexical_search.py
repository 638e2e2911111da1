"""The documents that answer a text best by BM25, without scoring all that have a word of it.

FTS5 scores every document that has any of the words, and the common words of a text stand in a large part of a
namespace. But a word adds at most (k1 + 1) · idf to a score, little for a common one. So the **essential** words are
found, the rarest, so many that documents with none of them can't reach the best ``count``; only documents with an
essential word are scored, by all words. Nothing is missed by it: MaxScore (Turtle and Flood, 1995) with a query's words
as the lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from bank_service.attributes import holds
from bank_service.filters import Condition
from bank_service.lexical import table_of
from bank_service.prepared import Prepared, among, listed, run_text
from bank_service.quota import usage
from bank_service.tables import documents

MAX_WORDS = 128  # different words of a query that count; each is a list of documents to go through
SPARE = 64  # scored more than asked for, to see whether the last ones are equally good as others left out
_SATURATION = 2.2  # k1 + 1 of FTS5's BM25: the most by which a word's count multiplies its idf
_LEAST_IDF = 1e-6  # FTS5's, of a word that half of the documents have
_WORD = re.compile(r"\w+")

_IDS = Prepared(sa.select(documents.c.key, documents.c.id).where(documents.c.key.in_(among("keys"))))


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
    num_essential = _first_guess(words, count)
    while True:
        search = _Search(connection, table, _expression(words, num_essential), conditions)
        found = search.best(count)
        # Documents that are as good as the last one may be among those that were not scored: "<", not "<=".
        least = min(found.values()) if len(found) == count else 0.0
        needed = next((n for n in range(len(words)) if sum(word.bound for word in words[n:]) < least), len(words))
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


def _first_guess(words: Sequence[_Word], count: int) -> int:
    """The rarest words, until enough documents may have one."""
    reached = 0
    for index, word in enumerate(words, 1):
        reached += word.num_documents
        if reached >= count:
            return index
    return len(words)


def _expression(words: Sequence[_Word], num_essential: int) -> str:
    """Documents with one of the first words, in which each word counts twice.

    FTS5 scores by all that stands in an expression, as often as it stands there, and has nothing that counts and need
    not be there.
    """
    must = [word.quoted for word in words[:num_essential]]
    may = [word.quoted for word in words[num_essential:]]
    return f"({' OR '.join([*must, *may, *may])}) AND ({' OR '.join(must)})"


class _Search:
    """One expression among the documents that match."""

    def __init__(self, connection: sa.Connection, table: str, expression: str, conditions: Sequence[Condition]) -> None:
        self._connection = connection
        self._found = sa.table(table, sa.column("rowid"), sa.column(table))
        score: sa.Label[float] = sa.literal_column(f"-bm25({table}) / 2").label("score")  # each word counts twice
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
            joined = self._scored.join_from(self._found, documents, documents.c.key == self._found.c.rowid)
            rows = self._connection.execute(joined.order_by(documents.c.id).limit(count)).all()
        keys = [int(row.rowid) for row in rows]
        ids = dict(tuple(row) for row in _IDS.rows(self._connection, keys=listed(keys)))
        ordered = sorted(rows, key=lambda row: (-row.score, ids[row.rowid]))
        return {int(row.rowid): float(row.score) for row in ordered[:count]}
