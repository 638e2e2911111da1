"""The words of documents, for BM25. The transaction that writes a document writes its words.

A row has a document's different words and their counts. An index over the words finds the documents that have one of
them. A table counts the documents of each word. A word is a number here: a hash of the namespace and the word. So a
word is counted and found in its namespace alone.

A removed document's rows are deleted. PostgreSQL's own vacuum frees their room later.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.contract import CatalogView
from bank_service.catalog.postgres.copy_rows import copy_rows
from bank_service.catalog.postgres.json_conditions import meets
from bank_service.catalog.postgres.partitions import number_of, partition
from bank_service.catalog.postgres.postgres_tables import document_words, spaces, word_counts, words_version
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.made_words import FILLED_ROWS, are_current, living_documents, note_version
from bank_service.catalog.sql.max_score import DIGITS, SATURATION, Word, best_documents, searched_words, weighed
from bank_service.catalog.sql.prepared import run_text
from bank_service.catalog.sql.quota import usage
from bank_service.catalog.sql.versions import Row
from bank_service.errors import BankInUseError
from bank_service.values.embedder import embedded_text
from bank_service.values.filters import Condition
from bank_service.values.words import document_words as words_of

_KINDS = {"key": "int8", "id": "text", "num_words": "int4", "words": "int8[]", "counts": "int4[]"}
_PUT = (
    "INSERT INTO document_words (key, id, num_words, words, counts) "
    "VALUES (%(key)s, %(id)s, %(num_words)s, %(words)s, %(counts)s)"
)
_COUNT = (
    "INSERT INTO word_counts (word, num_documents) SELECT unnest(%(words)s::bigint[]), 1 "
    "ON CONFLICT (word) DO UPDATE SET num_documents = word_counts.num_documents + 1"
)
_COUNT_ALL = (
    "INSERT INTO word_counts (word, num_documents) "
    "SELECT word, count(*) FROM document_words, unnest(words) AS word GROUP BY word"
)
_LENGTHEN = "UPDATE spaces SET num_words = num_words + %(more)s WHERE number = %(number)s"
_REMOVE = "DELETE FROM document_words WHERE key = %(key)s RETURNING num_words, words"
_UNCOUNT = "UPDATE word_counts SET num_documents = num_documents - 1 WHERE word = ANY(%(words)s)"
_FORGET = "DELETE FROM word_counts WHERE word = ANY(%(words)s) AND num_documents = 0"
_COUNTS = "SELECT word, num_documents FROM word_counts WHERE word = ANY(%(words)s)"
_LENGTH = "SELECT num_words FROM spaces WHERE number = %(number)s"


class PostgresWords:
    """Implements ``contract.WordSearch``."""

    def best(
        self, view: CatalogView, namespace: str, text: str, conditions: Sequence[Condition], count: int
    ) -> dict[int, float]:
        assert isinstance(view, SqlView)
        connection = view.connection
        number = number_of(connection, namespace)
        asked = {} if number is None else {hash_of(number, word): word for word in searched_words(text)}
        if number is None or not asked:
            return {}
        num_documents = usage(connection, namespace).num_documents
        counts = run_text(connection, _COUNTS, {"words": list(asked)})
        words = weighed({asked[word]: int(num) for word, num in counts}, num_documents)
        ((num_words,),) = run_text(connection, _LENGTH, {"number": number})
        mean = num_words / max(1, num_documents)
        return best_documents(
            words, count, lambda num: _search(connection, number, words, num, mean, conditions, count)
        )

    async def clean(self) -> None:
        """Does nothing: PostgreSQL's vacuum removes deleted rows."""


def put_words(connection: sa.Connection, number: int, new: Row) -> None:
    """Adds a document's words, so that searches find it. ``number``: of its namespace."""
    row = _words_row(number, new)
    run_text(connection, _PUT, row)
    run_text(connection, _COUNT, row)
    run_text(connection, _LENGTHEN, {"number": number, "more": row["num_words"]})


def remove_words(connection: sa.Connection, number: int, key: int) -> None:
    """Removes a document's words."""
    for num_words, words in run_text(connection, _REMOVE, {"key": key}):
        run_text(connection, _UNCOUNT, {"words": words})
        run_text(connection, _FORGET, {"words": words})
        run_text(connection, _LENGTHEN, {"number": number, "more": -num_words})


def renew_words(connection: sa.Connection, *, is_alone: bool = True) -> None:
    """Makes all words anew if another version made them, in minutes for a million documents.

    Without ``is_alone``, other nodes make words of that version: BankInUseError.
    """
    if are_current(connection, words_version):
        return
    if not is_alone:
        raise BankInUseError(
            "all nodes of a catalog must make the same words, got another Python or another version of the bank on "
            "this one; stop the other nodes first, or start this one with their Python"
        )
    for table in (document_words, word_counts):
        connection.execute(sa.delete(table))
    connection.execute(sa.update(spaces).values(num_words=0))
    fill_words(connection, connection)


def fill_words(connection: sa.Connection, source: sa.Connection) -> None:
    """Makes the words of all living documents of ``source``, which is this catalog or one with the same documents."""
    numbers = {row.namespace: int(row.number) for row in connection.execute(sa.select(spaces))}
    lengths = dict.fromkeys(numbers.values(), 0)
    documents = living_documents(source)
    while rows := list(islice(documents, FILLED_ROWS)):
        made = [_words_row(numbers[row["namespace"]], row) for row in rows]
        copy_rows(connection, "document_words", _KINDS, [tuple(row.values()) for row in made])
        for row, words in zip(rows, made, strict=True):
            lengths[numbers[row["namespace"]]] += words["num_words"]
    run_text(connection, _COUNT_ALL)
    for number, length in lengths.items():
        run_text(connection, _LENGTHEN, {"number": number, "more": length})
    note_version(connection, words_version)


def _words_row(number: int, document: Row) -> dict[str, Any]:
    """A document's row of ``document_words``."""
    counts = Counter(words_of(embedded_text(document["title"], document["text"])).split())
    by_number = sorted((hash_of(number, word), count) for word, count in counts.items())
    return {
        "key": document["key"],
        "id": document["id"],
        "num_words": counts.total(),
        "words": [word for word, _ in by_number],
        "counts": [count for _, count in by_number],
    }


def hash_of(number: int, word: str) -> int:
    """A word of a namespace as a number of 64 bits."""
    digest = hashlib.blake2b(f"{number} {word}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _search(
    connection: sa.Connection,
    number: int,
    words: Sequence[Word],
    num_essential: int,
    mean: float,
    conditions: Sequence[Condition],
    count: int,
) -> dict[int, float]:
    """key → score of the best documents that have one of the first ``num_essential`` words, ties by id."""
    own = document_words.c
    score = sa.func.round(sa.cast(_score(number, words, mean), sa.Numeric), DIGITS).label("score")
    essential = [hash_of(number, word.text) for word in words[:num_essential]]
    query = sa.select(own.key, score).where(own.words.overlap(essential))
    if conditions:
        vectors = partition(number)
        query = query.join(vectors, vectors.c.key == own.key)
        query = query.where(*(meets(vectors.c.pairs, item) for item in conditions))
    rows = connection.execute(query.order_by(score.desc(), own.id).limit(count))
    return {int(key): float(value) for key, value in rows}


def _score(number: int, words: Sequence[Word], mean: float) -> sa.ColumnElement[float]:
    """BM25 of a document in SQL, with k1 = 1.2 and b = 0.75. ``width_bucket`` finds a word in the document's own.

    A word that occurs n times adds 2.2 idf n / (n + k), which is 2.2 idf (1 - k / (n + k)).
    """
    own = document_words.c
    k = 1.2 * (0.25 + 0.75 * sa.cast(own.num_words, sa.Float) / mean)
    total: sa.ColumnElement[float] = sa.literal(0.0)
    for word in words:
        wanted = sa.literal(hash_of(number, word.text), sa.BigInteger)
        place = sa.func.width_bucket(wanted, own.words, type_=sa.Integer)
        added = SATURATION * word.idf * (1.0 - k / (sa.cast(own.counts[place], sa.Float) + k))
        total = total + sa.case((own.words[place] == wanted, added), else_=0.0)
    return total
