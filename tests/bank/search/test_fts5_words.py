"""FTS5's own: it scores few documents, and deleted words leave its file."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bank_service.catalog.sql.max_score import MAX_WORDS
from bank_service.catalog.sqlite import lexical_search
from bank_service.catalog.sqlite.catalog import SqliteCatalog
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient

VOCABULARY = [f"word{number}" for number in range(60)]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[SqliteCatalog]:
    """500 documents by Zipf's law."""
    made = SqliteCatalog(tmp_path / "catalog.sqlite", IDENTITY)
    rng = random.Random(0)
    weights = [1 / (number + 1) for number in range(60)]
    texts = [" ".join(rng.choices(VOCABULARY, weights, k=rng.randint(3, 20))) for _ in range(500)]
    for future in [made.put(document(f"{number}", text), gradient(), None) for number, text in enumerate(texts)]:
        future.result()
    yield made
    made.close()


def best(catalog: SqliteCatalog, text: str, count: int) -> dict[int, float]:
    with catalog.view() as view:
        return catalog.words.best(view, "n", text, (), count)


def test_documents_without_an_essential_word_are_not_scored(
    catalog: SqliteCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[list[str]] = []  # of each look, the essential words
    plain = lexical_search._Search

    def seen(connection: Any, table: str, words: Any, num_essential: int, conditions: Any) -> Any:
        scored.append([word.text for word in words[:num_essential]])
        return plain(connection, table, words, num_essential, conditions)

    monkeypatch.setattr(lexical_search, "_Search", seen)
    # Two words that hardly a document has, two that most have, which can't bring a document among the best.
    best(catalog, "word0 word1 word50 word40", 3)
    assert len(scored[-1]) < 3 and not {"word0", "word1"} & set(scored[-1]), scored
    scored.clear()
    best(catalog, "word0 word1", 3)
    assert scored == [["word1", "word0"]], "all at once, where it would leave few out"


def test_of_too_many_words_the_first_and_the_last_count(catalog: SqliteCatalog) -> None:
    half = (
        [f"absent{number}" for number in range(MAX_WORDS // 2)],
        [f"none{number}" for number in range(MAX_WORDS // 2)],
    )
    first, last = map(" ".join, half)
    rarest = VOCABULARY[-1]
    alone = best(catalog, rarest, 60)
    assert alone == best(catalog, f"{rarest} {first} {last}", 60) == best(catalog, f"{first} {last} {rarest}", 60)
    assert alone == best(catalog, f"{rarest} {first} {last} {rarest}", 60), "it counts once"
    assert best(catalog, f"{first} {rarest} {last}", 60) == {}


def has_word(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return b"quilegren" in path.read_bytes()


def test_a_deleted_documents_rare_word_leaves_the_file(catalog: SqliteCatalog, tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    catalog.put(document("rare", "the quilegren"), gradient(), None).result()
    assert has_word(path)
    catalog.delete("n", "rare", None).result()
    assert has_word(path), "else this test shows nothing: FTS5 keeps the word until a merge"
    asyncio.run(catalog.words.clean())
    assert not has_word(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT sum(num_removed) FROM lexical_spaces").fetchone() == (0,)


def test_a_cleaning_that_was_cancelled_in_its_last_step_counts_once(catalog: SqliteCatalog, tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"

    async def clean_three_times() -> None:
        with closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")  # holds the steps up
            for _ in range(2):
                given_up = asyncio.create_task(catalog.words.clean())
                await asyncio.sleep(0.1)
                given_up.cancel()
            last = asyncio.create_task(catalog.words.clean())
            await asyncio.sleep(0.1)
        await last

    catalog.delete("n", "0", None).result()
    asyncio.run(clean_three_times())
    catalog.put(document("rare", "the quilegren"), gradient(), None).result()
    catalog.delete("n", "rare", None).result()
    asyncio.run(catalog.words.clean())
    assert not has_word(path), "the removals before were counted twice, and this one was taken for cleaned"
