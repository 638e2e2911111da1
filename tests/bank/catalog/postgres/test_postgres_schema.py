"""Nodes of two versions with one catalog: one knows a later schema than the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import psycopg
import pytest
import sqlalchemy as sa

from bank_service.catalog.contract import Catalog
from bank_service.catalog.postgres import postgres_catalog
from bank_service.catalog.postgres.postgres_tables import own_metadata
from bank_service.catalog.sql import collection_row
from bank_service.catalog.sql.collection_row import SCHEMA_VERSION
from bank_service.catalog.sql.tables import collection
from bank_service.errors import BankInUseError, CatalogReadError, CollectionMismatchError
from tests.bank.catalog.postgres.conftest import Line, Opener, put, until
from tests.bank.catalog.postgres.test_postgres_nodes import end_connections

LATER = SCHEMA_VERSION + 1
Later = Callable[[], AbstractContextManager[None]]


def ids_of(catalog: Catalog) -> set[str]:
    with catalog.view() as view:
        return {entry.id for entry in view.page("n", "", 99)}


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """Inside the block, banks are of a later version. Its documents have a color, and its words another table."""

    def upgrade(connection: sa.Connection, _: int) -> sa.RowMapping:
        connection.exec_driver_sql("ALTER TABLE versions ADD color text NOT NULL DEFAULT 'red'")
        connection.exec_driver_sql("ALTER TABLE word_counts RENAME TO words_of_all")
        connection.execute(sa.update(collection).values(schema_version=LATER))
        return connection.execute(sa.select(collection)).mappings().one()

    def opening(*args: object, **given: object) -> str:
        return collection_row.open_collection(*args, **{**given, "upgrade": partial(upgrade, args[0])})  # type: ignore

    @contextmanager
    def block() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(collection_row, "SCHEMA_VERSION", LATER)
            patch.setattr(postgres_catalog, "open_collection", opening)
            yield

    return block


def test_a_newer_node_adds_a_table_and_older_ones_go_on_beside_it(opener: Opener, url: str) -> None:
    older = opener()
    put(older, "a")
    added = sa.Table("added", own_metadata, sa.Column("id", sa.Integer, primary_key=True))
    try:
        newer = opener()
    finally:
        own_metadata.remove(added)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("INSERT INTO added VALUES (7)")
        again = opener()
        for number, catalog in enumerate((older, newer, again)):
            put(catalog, f"b{number}")
        assert all(ids_of(catalog) == {"a", "b0", "b1", "b2"} for catalog in (older, newer, again))
        assert connection.execute("SELECT id FROM added").fetchall() == [(7,)]


def test_a_node_with_another_schema_waits_for_the_end_of_all_older_ones_and_none_comes_back(
    opener: Opener, url: str, later: Later
) -> None:
    older = opener()
    put(older, "a")
    for _ in range(2):
        with later(), pytest.raises(BankInUseError, match=f"must get schema {LATER} by a node that is alone"):
            opener()
        put(older, "a", "1")
    older.close()
    with later():
        newer = opener()
    refusal = f"must have schema {SCHEMA_VERSION} or an older one, got {LATER} of a newer version"
    changed = "SELECT to_regclass('word_counts'), schema_version, color FROM collection, versions"
    for _ in range(2):
        with pytest.raises(CollectionMismatchError, match=refusal):
            opener()
        with psycopg.connect(url) as connection:
            assert connection.execute(changed).fetchall() == [(None, LATER, "red")], "the refused start changes nothing"
    assert ids_of(newer) == {"a"}


def test_an_upgrade_that_fails_leaves_the_older_schema(
    opener: Opener, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = opener()
    put(older, "a")
    older.close()
    with later(), monkeypatch.context() as patch:

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(postgres_catalog, "renew_words", killed)  # after the upgrade, before its commit
        with pytest.raises(KeyboardInterrupt):
            opener()
    again = opener()
    put(again, "b")
    assert ids_of(again) == {"a", "b"}


def test_an_older_node_that_was_away_during_an_upgrade_stops(
    opener: Opener, url: str, line: Line, later: Later
) -> None:
    older = opener(url=line.url(url))
    put(older, "a")
    line.is_broken = True
    end_connections(url)
    with later():
        newer = opener()
    line.is_broken = False

    def is_stopped() -> bool:
        try:
            ids_of(older)
        except CatalogReadError as error:
            return "history or schema" in str(error)
        return False

    until(is_stopped)
    assert ids_of(newer) == {"a"}
