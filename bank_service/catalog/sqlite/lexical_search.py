"""Finds the best documents for a text by BM25, without a score for every document that has a word of it.

FTS5 scores every document that has any of the words, and common words occur in a large part of a namespace. But a word
adds at most (k1 + 1) · idf to a score, which is little for a common word. So only the rarest words are **essential**: a
document without any of them can't reach the best ``count``. Only documents with an essential word are scored, by all
words. The result is exact. This is MaxScore (Turtle and Flood, 1995) with a query's words as the lists. If it would
save little, all documents with a word are scored.

Scores are rounded, so that the order of a sum does not decide between equally good documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from bank_service.catalog.sqlite.attributes import holds
from bank_service.catalog.sqlite.lexical import table_of
from bank_service.catalog.sqlite.prepared import Prepared, among, listed, run_text
from bank_service.catalog.sqlite.quota import usage
from bank_service.catalog.sqlite.tables import now, versions
from bank_service.values.filters import Condition
from bank_service.values.words import query_words

MAX_WORDS = 128  # words of a query that are searched; each has a list of documents to read
WORTHWHILE = 0.25  # if the essential words have a larger share of all list entries, all documents are scored
SPARE = 64  # documents read beyond ``count``, to see ties at the end
_SATURATION = 2.2  # k1 + 1 of FTS5's BM25: a word adds at most so many times its idf to a score
_LEAST_IDF = 1e-6  # FTS5's idf of a word in half of the documents or more
_DIGITS = 9  # decimal places of a score; FTS5's sums are exact to about 14
_ROUNDING = 10.0**-_DIGITS

_IDS = Prepared(sa.select(versions.c.key, versions.c.id).where(versions.c.key.in_(among("keys")), now))


@dataclass(frozen=True, slots=True)
class _Word:
    quoted: str  # for FTS5's MATCH, which takes no quoted word for an operator
    num_documents: int
    bound: float  # the most that the word adds to a document's score


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
        # A document that was not scored could be as good as the last one found.
        least = min(found.values()) - 2 * _ROUNDING if len(found) == count else 0.0
        needed = _needed(words, least)
        if needed <= num_essential:
            return found
        num_essential = needed


def _words(connection: sa.Connection, table: str, namespace: str, text: str) -> list[_Word]:
    """The words of a user's text that occur in the namespace, the rarest first."""
    total = usage(connection, namespace).num_documents
    words: list[_Word] = []
    for word in _chosen(query_words(text)):
        quoted = f'"{word}"'
        counted = f"SELECT count(*) FROM {table} WHERE {table} MATCH ?"
        ((number,),) = run_text(connection, counted, (quoted,))
        if number:
            # The same formula as FTS5's. Without the lower bound, a word in half of the documents or more has idf ≤ 0.
            idf = max(math.log((total - number + 0.5) / (number + 0.5)), _LEAST_IDF)
            words.append(_Word(quoted, number, _SATURATION * idf))
    return sorted(words, key=lambda word: word.num_documents)


def _chosen(words: list[str]) -> list[str]:
    """The different words. Of more than MAX_WORDS the first and the last ones, because a question may stand before or
    behind a long text."""
    first, last = list(dict.fromkeys(words)), list(dict.fromkeys(reversed(words)))
    half = MAX_WORDS // 2
    return first if len(first) <= MAX_WORDS else list(dict.fromkeys([*first[:half], *last[:half]]))


def _needed(words: Sequence[_Word], least: float) -> int:
    """The number of rarest words that are essential, if a document needs at least the score ``least``."""
    return next((n for n in range(len(words)) if sum(word.bound for word in words[n:]) < least), len(words))


def _guess(words: Sequence[_Word], count: int) -> int:
    """Guesses the number of essential words for the first search. A wrong guess costs only a second search.

    Takes the rarest words until ``count`` documents have one. It assumes that the last of these documents has only the
    last word, once, in a text of mean length. Its score then gives the number of words that are needed.
    """
    reached = 0
    for index, word in enumerate(words, 1):
        reached += word.num_documents
        if reached >= count:
            return max(index, _needed(words, word.bound / _SATURATION))
    return len(words)


def _postings(words: Sequence[_Word]) -> int:
    return sum(word.num_documents for word in words)


class _Search:
    """The matching documents that have one of the first ``num_essential`` words, scored by all words."""

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
            # FTS5 scores by every word of the expression, as often as it occurs there. It has no optional words. The
            # expression names the essential words twice: once as a requirement. So it also names the others twice, and
            # the score is halved.
            expression, times = f"({' OR '.join([*must, *may, *may])}) AND ({expression})", 2
        score: sa.Label[float] = sa.literal_column(f"round(-bm25({table}) / {times}, {_DIGITS})").label("score")
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
