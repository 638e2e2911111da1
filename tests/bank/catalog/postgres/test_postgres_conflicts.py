"""Sessions of other programs that get in a bank's way: conflicts cost a write time, and nothing is lost or doubled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.factory import open_catalog
from bank_service.catalog.postgres import connect
from bank_service.catalog.postgres.membership import WRITES
from bank_service.errors import UnavailableError
from bank_service.values.documents import PutResult
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient
from tests.bank.postgres_server import shared_server

LOCK_COLLECTION = "UPDATE collection SET id = id"


@pytest.fixture
def url() -> str:
    return shared_server().new_schema()


@pytest.fixture
def other(url: str) -> Iterator[psycopg.Connection]:
    """Another program's session, in a transaction."""
    with psycopg.connect(url) as connection:
        yield connection


@contextmanager
def opened(folder: Path, url: str) -> Iterator[Catalog]:
    catalog = open_catalog(folder, IDENTITY, url=url)
    try:
        yield catalog
    finally:
        catalog.close()


def waiting(connection: psycopg.Connection, put: Future[PutResult]) -> None:
    """Returns when the bank waits for a lock of another session. The test's own limit ends it."""
    with psycopg.connect(connection.info.dsn, autocommit=True) as watcher:
        while not watcher.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone():
            assert not put.done()
            time.sleep(0.01)


def test_a_write_in_a_deadlock_is_done_again(tmp_path: Path, url: str, other: psycopg.Connection) -> None:
    with opened(tmp_path, url) as catalog:
        catalog.put(document("a"), gradient(), None).result()
        other.execute("UPDATE namespace_usage SET namespace = namespace")
        put = catalog.put(document("b"), gradient("1"), None)
        waiting(other, put)
        # The bank has waited longer, so the server ends its transaction. It may end this one on a busy machine.
        with suppress(psycopg.errors.DeadlockDetected):
            other.execute(LOCK_COLLECTION)
        other.commit()
        assert put.result().stored.sequence == 2
        with catalog.view() as view:
            assert [entry.id for entry in view.page("n", "", 9)] == ["a", "b"] and view.sequence() == 2


def test_a_write_that_conflicts_again_and_again_fails_clearly_and_may_be_repeated(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url) as catalog, psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the text of a document' USING ERRCODE = '40001'; END $$"
        )
        connection.execute("CREATE TRIGGER conflict BEFORE INSERT ON versions FOR EACH ROW EXECUTE FUNCTION conflict()")
        with pytest.raises(UnavailableError, match="must be writable, got SerializationFailure 40001; try again$"):
            catalog.put(document("a"), gradient(), None).result()
        connection.execute("DROP TRIGGER conflict ON versions")
        assert catalog.put(document("a"), gradient(), None).result().stored.sequence == 1


def test_a_write_waits_for_another_node_and_then_fails_and_may_be_repeated(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connect.LOCK_SECONDS == 10, "docs/bank.md says so"
    monkeypatch.setattr(connect, "_SESSION", (*connect._SESSION, "SET lock_timeout = 500"))
    with opened(tmp_path, url) as catalog, psycopg.connect(url) as other:
        other.execute(f"SELECT pg_advisory_xact_lock({WRITES})")  # as of a node that hangs
        with pytest.raises(UnavailableError, match="must be writable, got LockNotAvailable 55P03; try again$"):
            catalog.put(document("a"), gradient(), None).result()
        with catalog.view() as view:
            assert not view.page("n", "", 9)
        other.rollback()
        assert catalog.put(document("a"), gradient(), None).result().stored.sequence == 1
