"""A folder of an older version is upgraded when it is opened, and nothing in it is lost."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tarfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import CollectionIdentity, SentenceVectors
from bank_service.catalog.factory import describe_copy, open_catalog
from bank_service.catalog.sqlite import upgrade
from bank_service.errors import VersionConflictError
from bank_service.testing.hash_encoder import HashEmbedder, spec_of
from bank_service.values.documents import Document, Query, Retrieval
from bank_service.values.filters import Condition, Operator
from tests.bank.catalog.test_catalog import document, gradient
from tests.bank.search.test_as_of import open_bank
from tests.bank.upkeep.test_erasure import num_erasures, within_the_bound

# A bank of schema 4 that was killed: with past versions, deletions, metadata, two namespaces, and two purges, of which
# the disk had refused one. ``answers.json`` has what it answered.
FOLDER = Path(__file__).with_name("folder_of_schema_4.tar.gz")
KEPT_SECONDS = 2**31  # so that the past of the folder is not over
IDENTITY = CollectionIdentity(
    spec_of().fingerprint, spec_of().layout_id, "int8", HashEmbedder.name, HashEmbedder.dimension
)
INDEXES_OF_SCHEMA_3 = (
    "DROP INDEX documents_by_gradient",
    "DROP INDEX history_by_gradient",
    "CREATE INDEX ix_documents_gradient_digest ON documents (gradient_digest)",
    "CREATE INDEX ix_history_gradient_digest ON history (gradient_digest)",
)
OF_SCHEMA_2 = (
    "DROP TABLE history",
    "DROP TABLE horizons",
    "DROP TABLE history_setting",
    "DROP TABLE erasures",
    "DROP INDEX documents_by_gradient",
)
OF_SCHEMA_1 = (
    "DROP TABLE lexical_1",
    "DROP TABLE lexical_2",
    "DROP TABLE lexical_spaces",
    "DROP TABLE attributes",
    "DROP INDEX documents_by_namespace",
)
WITHOUT_COUNTERS = (
    "DROP TRIGGER documents_insert_usage",
    "DROP TRIGGER documents_update_usage",
    "DROP TRIGGER documents_delete_usage",
    "DROP TABLE namespace_usage",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(FOLDER) as archive:
        archive.extractall(tmp_path / "bank", filter="data")
    return tmp_path / "bank"


def answers(folder: Path) -> Any:
    return json.loads((folder / "answers.json").read_text())


def become(folder: Path, schema: int, statements: Iterable[str]) -> None:
    """Makes the catalog one of an older schema."""
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.execute("UPDATE collection SET schema_version = ?", [schema])
        connection.commit()


def objects(folder: Path) -> set[tuple[str, str]]:
    """Every table, index and trigger."""
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        return set(connection.execute("SELECT type, name FROM sqlite_master"))


def usage(catalog: Catalog) -> dict[str, list[int]]:
    with catalog.view() as view:
        found = {name: view.usage(name) for name in ("default", "tenant")}
    return {name: [used.num_documents, used.num_bytes] for name, used in found.items()}


@pytest.mark.asyncio
async def test_a_folder_of_the_version_before_answers_as_it_did_and_goes_on(folder: Path) -> None:
    expected = answers(folder)
    async with open_bank(folder, history_seconds=KEPT_SECONDS) as bank:
        totals = (await bank.stats()).totals
        assert {name: getattr(totals, name) for name in expected["totals"] if name != "sequence"} == {
            name: value for name, value in expected["totals"].items() if name != "sequence"
        }
        for sequence, spaces in expected["as_of"].items():
            for namespace, documents in spaces.items():
                hits = (
                    await bank.query(Query(namespace, "owl", top_k=64, include_text=True, as_of=int(sequence)))
                ).hits
                assert {hit.id: [hit.version, hit.text, hit.gradient_digest] for hit in hits} == documents
        newest = expected["as_of"][str(expected["totals"]["sequence"])]["default"]
        for kind in (Retrieval.DENSE, Retrieval.LEXICAL):
            hits = (await bank.query(Query("", "owl hunts", top_k=64, include_gradients=True, retrieval=kind))).hits
            assert {hit.id for hit in hits} == (set(newest) if kind is Retrieval.DENSE else {"kept", "shared"})
        red = Condition("colour", Operator.EQUALS, ("red",))
        assert {hit.id for hit in (await bank.query(Query("", "owl", top_k=64, conditions=(red,)))).hits} == {"kept"}
        counts = await bank.scrub()
        assert (counts.num_gradients, counts.num_repaired, counts.num_lost) == (totals.num_gradients, 0, 0)
        put = await bank.put(Document("", "changed", "", "a fourth version"))
        assert (put.stored.version, put.stored.sequence) == (4, expected["totals"]["sequence"] + 1)
        back = await bank.put(Document("", "gone", "", "back after the upgrade"))
        assert back.stored.version == 2 and back.stored.key == 3
        new = await bank.put(Document("", "new", "", "of the version of now"))
        assert new.stored.key == new.stored.sequence


@pytest.mark.asyncio
async def test_a_purge_of_the_version_before_is_finished_and_may_come_again(folder: Path) -> None:
    stuck = folder / "blobs" / "3a" / "212544a91b3c2bd6ce616d03bebfb03152016aaea4435e1a762e45c986318c"
    assert stuck.exists()
    async with open_bank(folder, history_seconds=KEPT_SECONDS) as bank:
        with pytest.raises(VersionConflictError):
            await bank.delete("tenant", "stuck", 2, purge=True)
        assert (await bank.delete("tenant", "stuck", 1, purge=True)).version == 1
        await within_the_bound(lambda: not stuck.exists() and not num_erasures(folder))


@pytest.mark.parametrize(
    ("schema", "statements"),
    [
        (4, ()),
        (3, INDEXES_OF_SCHEMA_3),
        (2, OF_SCHEMA_2),
        (2, (*OF_SCHEMA_2, *WITHOUT_COUNTERS)),
        (1, (*OF_SCHEMA_2, *OF_SCHEMA_1)),
    ],
)
def test_every_older_schema_becomes_the_one_of_a_new_catalog(
    folder: Path, tmp_path: Path, schema: int, statements: tuple[str, ...]
) -> None:
    become(folder, schema, statements)
    expected = answers(folder)
    gradients = describe_copy(folder / "catalog.sqlite").gradients
    with_history = schema > 2
    for _ in range(2):  # upgraded once, and found so the next time
        catalog = open_catalog(folder, IDENTITY, history_seconds=KEPT_SECONDS)
        with catalog.view() as view:
            assert view.sequence() == expected["totals"]["sequence"]
            assert view.gradients("", 100) == gradients
            assert [view.horizon(name) for name in ("default", "tenant")] == ([0, 0] if with_history else [9, 16])
            found = {entry.id: view.get("default", entry.id) for entry in view.page("default", "", 100)}
            newest = expected["as_of"][str(view.sequence())]["default"]
            assert {id: item and item.document.text for id, item in found.items()} == {
                id: text for id, (_, text, _) in newest.items()
            }
            best = catalog.words.best(view, "default", "owl", [], 9)
            assert set(best) == {found[id].key for id in ("kept", "shared")}  # type: ignore[union-attr]
            red = Condition("colour", Operator.EQUALS, ("red",))
            assert view.matching("default", [red]) == [found["kept"].key]  # type: ignore[union-attr]
            assert view.totals().num_past_versions == (expected["totals"]["num_past_versions"] if with_history else 0)
        if with_history:
            assert usage(catalog) == expected["usage"]
        catalog.close()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    catalog = open_catalog(fresh, IDENTITY)
    for namespace in ("default", "tenant"):
        catalog.put(document(namespace=namespace), gradient(), None).result()
    catalog.close()
    assert objects(folder) == objects(fresh)


def with_words_of_schema_5(folder: Path) -> set[str]:
    """Makes a new catalog one of schema 5, where FTS5 made the words. Returns the ids of its documents."""
    folder.mkdir()
    catalog = open_catalog(folder, IDENTITY)
    texts = {"zh": "南京长江大桥", "fr": "Renée", "en": "an owl"}
    for id, text in texts.items():
        catalog.put(document(id, text, namespace="default"), gradient(), None).result()
    catalog.put(document("gone", "a badger", namespace="default"), gradient(), None).result()
    catalog.delete("default", "gone", None).result()
    with catalog.view() as view:
        keys = {item.id: item.key for item in view.candidates(range(9))}
    catalog.close()
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        connection.execute("DROP TABLE lexical_1")
        tokenizer = "unicode61 remove_diacritics 2"
        connection.execute(f"CREATE VIRTUAL TABLE lexical_1 USING fts5(text, content='', tokenize='{tokenizer}')")
        for id, text in texts.items():
            connection.execute("INSERT INTO lexical_1(rowid, text) VALUES (?, ?)", (keys[id], text))
        connection.commit()
    become(folder, 5, ())
    return set(keys)


def lexical(catalog: Catalog, text: str) -> set[str]:
    with catalog.view() as view:
        return {item.id for item in view.candidates(list(catalog.words.best(view, "default", text, [], 9)))}


@pytest.mark.parametrize("fails", [False, True])
def test_the_words_of_schema_5_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Whole or not at all, as at a kill: the upgrade is one transaction."""
    folder = tmp_path / "bank"
    ids = with_words_of_schema_5(folder)
    before = objects(folder)
    if fails:
        fill_words = upgrade.fill_words

        def fail(connection: Any) -> None:
            fill_words(connection)
            raise OSError("no space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(upgrade, "fill_words", fail)
            with pytest.raises(OSError, match="no space left"):
                open_catalog(folder, IDENTITY)
        with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
            assert connection.execute("SELECT schema_version FROM collection").fetchone() == (5,)
            assert connection.execute("SELECT count(*) FROM lexical_1 WHERE lexical_1 MATCH '大桥'").fetchone() == (0,)
    for _ in range(2):  # upgraded once, and found so the next time
        catalog = open_catalog(folder, IDENTITY)
        found = {text: lexical(catalog, text) for text in ("大桥", "Rene\u0301e", "owl", "badger")}
        assert found == {"大桥": {"zh"}, "Rene\u0301e": {"fr"}, "owl": {"en"}, "badger": set()}
        with catalog.view() as view:
            assert {entry.id for entry in view.page("default", "", 9)} == ids
        catalog.close()
    assert objects(folder) == before
    catalog = open_catalog(folder, IDENTITY)
    catalog.delete("default", "zh", None).result()
    asyncio.run(catalog.words.clean())
    assert lexical(catalog, "大桥") == set() and lexical(catalog, "owl") == {"en"}
    catalog.close()


@pytest.mark.parametrize(
    "version", ["UPDATE words_version SET version = 'of another Python'", "DELETE FROM words_version"]
)
def test_words_of_another_version_are_made_anew(tmp_path: Path, version: str) -> None:
    """FTS5 removes a document only by the words that it got."""
    texts = {"owl": "an owl hunts", "fox": "a fox sleeps"}
    catalog = open_catalog(tmp_path, IDENTITY)
    keys = {
        id: catalog.put(document(id, text, namespace="default"), gradient(), None).result().stored.key
        for id, text in texts.items()
    }
    catalog.close()
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as connection:
        connection.execute("INSERT INTO lexical_1(lexical_1) VALUES ('delete-all')")
        for key in keys.values():
            connection.execute("INSERT INTO lexical_1(rowid, text) VALUES (?, 'words of before')", (key,))
        connection.execute(version)
        connection.commit()
    catalog = open_catalog(tmp_path, IDENTITY)
    assert lexical(catalog, "owl") == {"owl"} and lexical(catalog, "before") == set()
    catalog.delete("default", "owl", None).result()
    assert lexical(catalog, "owl hunts") == set() and lexical(catalog, "sleeps") == {"fox"}
    catalog.close()


def test_a_folder_of_schema_6_gets_vectors_of_sentences_as_they_are_needed(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path, IDENTITY)
    catalog.put(document(), gradient(), None).result()
    catalog.close()
    before = objects(tmp_path)
    become(tmp_path, 6, ["DROP TABLE sentence_vectors"])
    catalog = open_catalog(tmp_path, IDENTITY)
    with catalog.view() as view:
        assert view.texts([1])[1].sentences is None
    assert catalog.put_sentences(1, SentenceVectors(b"places", b"vectors")).result() is True
    catalog.close()
    assert objects(tmp_path) == before


def test_the_vectors_of_schema_7_count_as_bytes_after_the_upgrade(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path, IDENTITY)
    catalog.put(document(namespace="tenant"), gradient(), None, SentenceVectors(b"places", b"vectors")).result()
    expected = usage(catalog)
    catalog.close()
    become(tmp_path, 7, ["UPDATE namespace_usage SET num_bytes = num_bytes - 13"])
    catalog = open_catalog(tmp_path, IDENTITY)
    assert usage(catalog) == expected
    catalog.delete("tenant", "a", None).result()
    assert usage(catalog)["tenant"] == [0, 0]
    catalog.close()


def test_an_upgrade_that_fails_near_its_end_leaves_the_folder_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(connection: object) -> None:
        raise OSError("no space left on device")

    before, gradients = objects(folder), describe_copy(folder / "catalog.sqlite").gradients
    with monkeypatch.context() as broken:
        broken.setattr(upgrade, "count_anew", fail)
        with pytest.raises(OSError, match="no space left"):
            open_catalog(folder, IDENTITY, history_seconds=KEPT_SECONDS)
    assert objects(folder) == before and describe_copy(folder / "catalog.sqlite").gradients == gradients
    catalog = open_catalog(folder, IDENTITY, history_seconds=KEPT_SECONDS)
    assert usage(catalog) == answers(folder)["usage"]
    catalog.close()
