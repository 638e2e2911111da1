"""The suite of every catalog for sentences' vectors: they live and end with their version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import SentenceVectors, VersionText
from tests.bank.catalog.test_catalog import document, gradient

if TYPE_CHECKING:
    from tests.bank.catalog.conftest import Opener


def vectors(number: int) -> SentenceVectors:
    return SentenceVectors(bytes([number]) * 8, bytes([number]) * 16)


def texts(catalog: Catalog, *began: int) -> dict[int, VersionText]:
    with catalog.view() as view:
        return view.texts(began)


def test_a_version_has_the_vectors_that_it_was_stored_with(open_store: Opener) -> None:
    catalog = open_store()
    catalog.put(document("a", "one"), gradient(), None, vectors(1)).result()
    catalog.put(document("b", "two"), gradient(), None).result()
    expected = {1: VersionText("", "one", vectors(1)), 2: VersionText("", "two", None)}
    assert texts(catalog, 1, 2, 3) == expected
    catalog.close()
    assert texts(open_store(), 2, 1) == expected


def test_a_version_without_vectors_gets_them_once(catalog: Catalog) -> None:
    catalog.put(document(), gradient(), None).result()
    assert catalog.put_sentences(1, vectors(1)).result() is True
    assert catalog.put_sentences(1, vectors(2)).result() is False, "it has some"
    assert catalog.put_sentences(2, vectors(2)).result() is False, "there is no such version"
    assert texts(catalog, 1)[1].sentences == vectors(1)
    catalog.delete("n", "a", None).result()
    assert catalog.put_sentences(1, vectors(1)).result() is False, "it is gone"
    assert catalog.put_sentences(2, vectors(1)).result() is False, "a deletion has no text"
    assert texts(catalog, 1, 2) == {}


def test_a_new_version_keeps_the_vectors_of_the_same_text_and_of_no_other(open_store: Opener) -> None:
    for history_seconds in (0, 3600):
        catalog = open_store(history_seconds=history_seconds)
        name = f"d{history_seconds}"
        first = catalog.put(document(name), gradient(), None, vectors(1)).result().stored.sequence
        for change in (document(name, metadata={"colour": "red"}), document(name)):
            last = catalog.put(change, gradient("1"), None).result().stored.sequence
        assert texts(catalog, last)[last].sentences == vectors(1)
        assert set(texts(catalog, first)) == ({first} if history_seconds else set())
        other = catalog.put(document(name, "other"), gradient("1"), None).result().stored.sequence
        assert texts(catalog, other)[other].sentences is None
        given = catalog.put(document(name, "more"), gradient("1"), None, vectors(2)).result().stored.sequence
        assert texts(catalog, given)[given].sentences == vectors(2)
        catalog.close()


def test_past_versions_have_theirs_until_they_expire_or_are_purged(open_store: Opener) -> None:
    catalog = open_store(history_seconds=3600)
    for number in (1, 2, 3):
        catalog.put(document(text=f"text {number}"), gradient(), None, vectors(number)).result()
    assert [text.sentences for text in texts(catalog, 1, 2, 3).values()] == [vectors(1), vectors(2), vectors(3)]
    catalog.expire_history(None, 1).result()
    assert set(texts(catalog, 1, 2, 3)) == {2, 3}
    catalog.delete("n", "a", None).result()
    assert texts(catalog, 3)[3].sentences == vectors(3), "the past knows it"
    catalog.delete("n", "a", None, purge=True).result()
    assert texts(catalog, 2, 3) == {}
    assert catalog.put_sentences(3, vectors(3)).result() is False


def test_a_past_version_gets_its_vectors_later_too(open_store: Opener) -> None:
    catalog = open_store(history_seconds=3600)
    for text in ("one", "two"):
        catalog.put(document(text=text), gradient(), None).result()
    assert catalog.put_sentences(1, vectors(1)).result() is True
    assert texts(catalog, 1) == {1: VersionText("", "one", vectors(1))}
