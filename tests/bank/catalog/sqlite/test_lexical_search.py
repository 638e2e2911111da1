"""BM25 without scoring all documents finds what scoring all of them finds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from bank_service.catalog.sqlite import lexical_search
from bank_service.catalog.sqlite.catalog import SqliteCatalog
from bank_service.catalog.sqlite.lexical import table_of
from bank_service.catalog.sqlite.lexical_search import MAX_WORDS, SPARE, best_words
from bank_service.values.documents import Document
from bank_service.values.filters import Condition, Operator
from tests.bank.catalog.test_catalog import IDENTITY, gradient

VOCABULARY = [f"word{number}" for number in range(60)]
WEIGHTS = [1 / (number + 1) for number in range(60)]  # the commonest in most documents
NUM_DOCUMENTS = 500
NUM_EQUAL = 150  # of a text of their own, more than SPARE and a query's hits


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqliteCatalog]:
    """500 documents by Zipf's law, 150 equal ones, a deleted one and another namespace's."""
    made = SqliteCatalog(tmp_path_factory.mktemp("lexical") / "catalog.sqlite", IDENTITY)
    rng = random.Random(0)
    for number in range(NUM_DOCUMENTS):
        text = " ".join(rng.choices(VOCABULARY, WEIGHTS, k=rng.randint(3, 20)))
        put(made, f"z{rng.random():.9f}", text, {"half": str(number % 2), "few": str(number % 50)})
    for number in range(NUM_EQUAL):
        put(made, f"equal{(number * 37) % NUM_EQUAL:03d}", "word0 same word1", {"half": "0"})
    put(made, "gone", "word59 word58 word57", {})
    made.delete("default", "gone", None).result()
    put(made, "x", "word59 word58", {}, namespace="tenant")
    yield made
    made.close()


def put(catalog: SqliteCatalog, id: str, text: str, metadata: dict[str, str], namespace: str = "default") -> None:
    catalog.put(Document(namespace, id, "", text, metadata), gradient(), None).result()


def all_scored(connection: sa.Connection, text: str, matching: set[int]) -> list[tuple[int, float]]:
    """Every document that has a word, by FTS5 in its plain form, ties by id."""
    table = table_of(connection, "default")
    expression = " OR ".join(f'"{word}"' for word in dict.fromkeys(text.split()))
    rows = connection.exec_driver_sql(
        f"SELECT d.key, round(-bm25({table}), 9) AS score FROM {table} JOIN documents d ON d.key = {table}.rowid "
        f"WHERE {table} MATCH ? ORDER BY score DESC, d.id",
        (expression,),
    )
    return [(key, score) for key, score in rows if key in matching]


@pytest.mark.parametrize("condition", [None, ("half", "1"), ("few", "7"), ("few", "none")])
def test_the_best_are_those_of_all(catalog: SqliteCatalog, condition: tuple[str, str] | None) -> None:
    rng = random.Random(1)
    conditions = [] if condition is None else [Condition(condition[0], Operator.EQUALS, (condition[1],))]
    with catalog.view() as view:
        matching = {
            stored.key
            for stored in view.after_key(0, 1_000)
            if condition is None or stored.document.metadata.get(condition[0]) == condition[1]
        }
        for _ in range(150):
            # Some by the law of the documents, some as likely as any: the rarest and the commonest meet in both.
            text = " ".join(
                rng.choices(VOCABULARY, rng.choice([WEIGHTS, [1.0] * 60]), k=rng.randint(1, 8)) + ["nowhere"]
            )
            count = rng.choice([1, 3, 10, 36])
            expected = all_scored(view._connection, text, matching)[:count]
            found = best_words(view._connection, "default", text, conditions, count)
            assert list(found.items()) == expected, text


def test_of_equal_documents_those_with_the_least_ids(catalog: SqliteCatalog) -> None:
    assert NUM_EQUAL > SPARE + 20
    with catalog.view() as view:
        ids = {stored.key: stored.document.id for stored in view.after_key(0, 1_000)}
        for count in (1, 20, NUM_EQUAL - 1):
            found = best_words(view._connection, "default", "same word0", [], count)
            assert [ids[key] for key in found] == [f"equal{number:03d}" for number in range(count)]


def test_documents_without_an_essential_word_are_not_scored(
    catalog: SqliteCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[list[str]] = []  # of each look, the essential words
    plain = lexical_search._Search

    def seen(connection: sa.Connection, table: str, words: Any, num_essential: int, conditions: Any) -> Any:
        scored.append([word.quoted for word in words[:num_essential]])
        return plain(connection, table, words, num_essential, conditions)

    monkeypatch.setattr(lexical_search, "_Search", seen)
    with catalog.view() as view:
        # Two words that hardly a document has, two that most have, which can't bring a document among the best.
        best_words(view._connection, "default", "word0 word1 word50 word40", [], 3)
        assert len(scored[-1]) < 3 and not {'"word0"', '"word1"'} & set(scored[-1]), scored
        scored.clear()
        best_words(view._connection, "default", "word0 word1", [], 3)
        assert scored == [['"word1"', '"word0"']], "all at once, where it would leave few out"


def test_no_more_words_than_count(catalog: SqliteCatalog) -> None:
    *known, rarest = VOCABULARY
    text = " ".join([f"absent{number}" for number in range(MAX_WORDS - len(known))] + known)
    with catalog.view() as view:
        found = best_words(view._connection, "default", f"{text} {rarest}", [], 60)
        assert list(found.items()) == all_scored(view._connection, text, set(range(10_000)))[:60]
        assert list(found.items()) != all_scored(view._connection, f"{text} {rarest}", set(range(10_000)))[:60]


def test_equal_documents_are_equal_in_whatever_order_their_words_are_summed_up(tmp_path: Path) -> None:
    """Twelve words of about the same frequency, three a document: many sums of the same terms."""
    made = SqliteCatalog(tmp_path / "catalog.sqlite", IDENTITY)
    rng = random.Random(0)
    words = [f"w{number}" for number in range(12)]
    for number in range(300):
        put(made, f"d{(number * 77) % 300:04d}", " ".join(rng.sample(words, 3)), {})
    with made.view() as view:
        everything = set(range(10_000))
        for _ in range(300):
            text, count = " ".join(rng.sample(words, 4)), rng.choice([1, 2, 5])
            found = best_words(view._connection, "default", text, [], count)
            assert list(found.items()) == all_scored(view._connection, text, everything)[:count], text
    made.close()
