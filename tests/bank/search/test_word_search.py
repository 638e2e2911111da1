"""The conformance suite of searches by words: each catalog's own against the slow obvious BM25."""

from __future__ import annotations

import asyncio
import random
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from bank_service.catalog.contract import Catalog, WordSearch
from bank_service.catalog.factory import open_catalog
from bank_service.values.documents import Document
from bank_service.values.filters import Condition, Operator
from tests.bank.catalog.test_catalog import IDENTITY, gradient
from tests.bank.postgres_server import schema_of
from tests.bank.search.plain_words import PlainWords

VOCABULARY = [f"word{number}" for number in range(60)]
WEIGHTS = [1 / (number + 1) for number in range(60)]  # the commonest in most documents
NUM_DOCUMENTS = 500
NUM_EQUAL = 150  # documents with one and the same text, more than a query's hits
Make = Callable[[Catalog], WordSearch]
KINDS = ("fts5", "plain", "postgres")


@lru_cache(maxsize=2)
def oracle_of(catalog: Catalog) -> PlainWords:
    """The same as long as it is asked about the same catalog."""
    return PlainWords()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(kind: str) -> Make:
    return oracle_of if kind == "plain" else lambda catalog: catalog.words


def opened(kind: str, folder: Path) -> Catalog:
    return open_catalog(folder, IDENTITY, url=schema_of(folder) if kind == "postgres" else None)


@pytest.fixture(scope="module")
def large(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """500 documents by Zipf's law, 150 equal ones, a deleted one and another namespace's."""
    made = opened(kind, tmp_path_factory.mktemp("large"))
    rng = random.Random(0)
    for number in range(NUM_DOCUMENTS):
        text = " ".join(rng.choices(VOCABULARY, WEIGHTS, k=rng.randint(3, 20)))
        put(made, f"z{rng.random():.9f}", text, half=str(number % 2), few=str(number % 50))
    for number in range(NUM_EQUAL):
        put(made, f"equal{(number * 37) % NUM_EQUAL:03d}", "word0 same word1", half="0")
    put(made, "gone", "word59 word58 word57")
    made.delete("n", "gone", None).result()
    put(made, "x", "word59 word58", namespace="tenant")
    yield made
    made.close()


@pytest.fixture
def small(kind: str, tmp_path: Path) -> Iterator[Catalog]:
    made = opened(kind, tmp_path)
    yield made
    made.close()


def put(catalog: Catalog, id: str, text: str, *, title: str = "", namespace: str = "n", **metadata: str) -> None:
    catalog.put(Document(namespace, id, title, text, metadata), gradient(), None).result()


def found(
    catalog: Catalog,
    words: WordSearch,
    text: str,
    count: int = 64,
    conditions: tuple[Condition, ...] = (),
    namespace: str = "n",
) -> dict[str, float]:
    """By id, in order."""
    with catalog.view() as view:
        scores = words.best(view, namespace, text, conditions, count)
        ids = {candidate.key: candidate.id for candidate in view.candidates(list(scores))}
    return {ids[key]: score for key, score in scores.items()}


def check(catalog: Catalog, words: WordSearch, text: str, count: int, conditions: tuple[Condition, ...] = ()) -> None:
    """The same documents as the oracle's, in the same order."""
    expected = found(catalog, oracle_of(catalog), text, count, conditions)
    ours = found(catalog, words, text, count, conditions)
    assert list(ours) == list(expected), text
    assert list(ours.values()) == pytest.approx(list(expected.values()), abs=2e-9), text


@pytest.mark.parametrize("condition", [None, ("half", "1"), ("few", "7"), ("few", "none")])
def test_the_best_are_those_of_all(large: Catalog, make: Make, condition: tuple[str, str] | None) -> None:
    rng, words = random.Random(1), make(large)
    conditions = () if condition is None else (Condition(condition[0], Operator.EQUALS, (condition[1],)),)
    for _ in range(40):
        # Some by the law of the documents, some as likely as any: the rarest and the commonest meet in both.
        drawn = rng.choices(VOCABULARY, rng.choice([WEIGHTS, [1.0] * 60]), k=rng.randint(1, 8))
        check(large, words, " ".join([*drawn, "nowhere"]), rng.choice([1, 3, 10, 36]), conditions)


def test_of_equal_documents_those_with_the_least_ids(large: Catalog, make: Make) -> None:
    for count in (1, 20, NUM_EQUAL - 1):
        ids = list(found(large, make(large), "same word0", count))
        assert ids == [f"equal{number:03d}" for number in range(count)]


def test_equal_documents_are_equal_in_whatever_order_their_words_are_summed_up(small: Catalog, make: Make) -> None:
    """Twelve words of about the same frequency, three a document: many sums of the same terms."""
    rng, names = random.Random(0), [f"w{number}" for number in range(12)]
    for number in range(200):
        put(small, f"d{(number * 77) % 200:04d}", " ".join(rng.sample(names, 3)))
    for _ in range(100):
        check(small, make(small), " ".join(rng.sample(names, 4)), rng.choice([1, 2, 5]))


def test_a_word_counts_in_title_and_text_whatever_its_case_and_accents(small: Catalog, make: Make) -> None:
    words = make(small)
    put(small, "a", "Größe des Hauses", title="Heading one")
    put(small, "b", "another text")
    for text in ("heading", "GRÖSSE grosse größe", "Hauses?", "one, two"):
        assert list(found(small, words, text)) == ["a"], text
    for text in ("", "!?", "_", "nothing", "head"):
        assert found(small, words, text) == {}, text


SPELLINGS = {
    "chinese": ("南京长江大桥是一座桥。", ("大桥", "长江大桥", "桥")),
    "japanese": ("東京タワーへ行く", ("タワー", "東京", "ﾀﾜｰ")),
    "korean": ("서울의 다리", ("서울", unicodedata.normalize("NFD", "서울"))),
    "thai": ("สวัสดีครับ", ("สวัสดี",)),
    "french": ("Renée arrive", ("Renée", unicodedata.normalize("NFD", "Renée"), "RENEE", "ｒｅｎéｅ")),
    "decomposed": (unicodedata.normalize("NFD", "Zoë"), ("Zoë", "zoe")),
}


def test_a_word_counts_in_every_script_and_spelling(small: Catalog, make: Make) -> None:
    words = make(small)
    for id, (text, _) in SPELLINGS.items():
        put(small, id, text)
    for id, (_, queries) in SPELLINGS.items():
        for text in queries:
            assert list(found(small, words, text)) == [id], text
    for id, (_, queries) in SPELLINGS.items():
        put(small, id, "another text")
        assert all(found(small, words, text) == {} for text in queries), id


@pytest.mark.parametrize("text", ['owl" OR "comet', "owl NOT owl", "text:owl", "owl*", "NEAR(owl, 2)", "-owl", "(owl"])
def test_nothing_in_a_text_is_an_operator(small: Catalog, make: Make, text: str) -> None:
    put(small, "owl", "an owl")
    put(small, "comet", "a comet")
    assert set(found(small, make(small), text)) == ({"owl", "comet"} if "comet" in text else {"owl"})


def test_another_namespace_shows_in_no_score(small: Catalog, make: Make) -> None:
    words = make(small)
    for id, text in {"a": "owl owl mice", "b": "mice in the barn", "c": "a bridge of stone"}.items():
        put(small, id, text)
    before = found(small, words, "owl barn")
    assert set(before) == {"a", "b"}
    for number in range(20):
        put(small, f"x{number}", "owl barn " * (number + 1), namespace="tenant")
    assert found(small, words, "owl barn") == before
    assert found(small, words, "owl", namespace="none") == {}


def test_a_change_and_a_deletion_show_at_once_and_count_in_no_score(small: Catalog, make: Make) -> None:
    words = make(small)
    for id in "abc":
        put(small, id, f"the text of {id}")
    before = found(small, words, "text of a")
    put(small, "d", "first text")
    put(small, "d", "second words")
    assert list(found(small, words, "first")) == [] and list(found(small, words, "second")) == ["d"]
    small.delete("n", "d", None).result()
    assert found(small, words, "second") == {}
    assert found(small, words, "text of a") == before


def test_cleaning_changes_no_answer(small: Catalog, make: Make) -> None:
    words = make(small)
    for number in range(60):
        put(small, f"{number:02}", f"words of number {number}")
    for number in range(0, 60, 2):
        small.delete("n", f"{number:02}", None).result()
    before = found(small, words, "number 5 7 8")
    assert len(before) == 30
    for _ in range(2):  # the second has nothing to do
        asyncio.run(words.clean())
        assert found(small, words, "number 5 7 8") == before
    put(small, "08", "number 8 again")
    assert "08" in found(small, words, "8")
