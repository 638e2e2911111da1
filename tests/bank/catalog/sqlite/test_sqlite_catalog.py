"""Tests of SQLite alone: its settings, its one writer, its log and its file."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from bank_service.catalog.sqlite.catalog import SqliteCatalog
from bank_service.errors import CatalogReadError, InternalError, UnavailableError, VersionConflictError
from bank_service.values.documents import Outcome
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def catalog(path: Path) -> Iterator[SqliteCatalog]:
    opened = SqliteCatalog(path, IDENTITY)
    yield opened
    opened.close()


def test_commits_are_durable_by_the_database_settings(catalog: SqliteCatalog) -> None:
    with catalog.view() as view:
        assert view._connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert view._connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_one_failing_write_does_not_touch_its_neighbours_in_the_transaction(catalog: SqliteCatalog) -> None:
    def fail(connection: sa.Connection) -> None:
        connection.execute(sa.text("DELETE FROM versions"))
        raise VersionConflictError("no", namespace="n", id="x", expected_version=1, actual_version=2)

    with ThreadPoolExecutor(20) as pool:
        puts = [pool.submit(catalog.put, document(str(n)), gradient(), None) for n in range(40)]
        failed = [pool.submit(catalog._writer.submit, fail) for _ in range(40)]
    for future in failed:
        with pytest.raises(VersionConflictError):
            future.result().result()
    assert sorted(future.result().result().stored.sequence for future in puts) == list(range(1, 41))
    with catalog.view() as view:
        assert len(view.page("n", "", 100)) == 40


def test_a_bug_in_a_write_reaches_its_caller_and_the_writer_lives_on(catalog: SqliteCatalog) -> None:
    def broken(connection: sa.Connection) -> None:
        raise KeyError("a bug")

    with pytest.raises(InternalError, match="KeyError: 'a bug'"):
        catalog._writer.submit(broken).result()
    assert catalog.put(document(), gradient(), None).result().outcome is Outcome.CREATED


def refuse_writes(connection: sa.Connection) -> None:
    connection.exec_driver_sql("PRAGMA query_only=ON")


def test_a_database_that_cannot_be_written_is_unavailable_not_acknowledged(catalog: SqliteCatalog) -> None:
    """Not by a new connection either."""
    engine = catalog._writer._engine
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA query_only=ON"))
    catalog._writer.submit(refuse_writes).result()
    with pytest.raises(UnavailableError, match="must be writable"):
        catalog.put(document(), gradient(), None).result()
    with catalog.view() as view:
        assert view.sequence() == 0


def test_writes_that_fail_together_have_an_error_each(catalog: SqliteCatalog) -> None:
    started, gate = threading.Event(), threading.Event()

    def wait(connection: sa.Connection) -> None:
        started.set()
        assert gate.wait(10)

    catalog._writer.submit(wait)
    assert started.wait(10)
    futures = [catalog._writer.submit(refuse_writes), *(catalog.put(document(id), gradient(), None) for id in "ab")]
    gate.set()
    errors = [future.exception(10) for future in futures]
    assert all(isinstance(error, UnavailableError) for error in errors)
    assert len({id(error) for error in errors}) == 3


def test_a_view_that_cannot_be_read_says_so_without_sqls_name(catalog: SqliteCatalog) -> None:
    with pytest.raises(CatalogReadError, match="must be readable"), catalog.view() as view:
        view._connection.exec_driver_sql("SELECT nothing FROM nowhere")


def test_a_deleted_documents_text_is_gone_from_the_file(catalog: SqliteCatalog, path: Path) -> None:
    catalog.put(document(text="a very secret sentence"), gradient(), None).result()
    catalog.delete("n", "a", 1).result()
    catalog.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT deleted, text, embedding FROM versions").fetchall() == [(1, "", None)]
    assert b"secret" not in b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_the_log_is_emptied_unless_somebody_reads_an_older_state(catalog: SqliteCatalog, path: Path) -> None:
    log = path.with_name(path.name + "-wal")
    catalog.put(document(), gradient(), None).result()
    with catalog.view() as view:
        view.sequence()
        catalog.put(document(text="other"), gradient("1"), None).result()
        assert catalog.empty_log().result() is False and log.stat().st_size
    assert catalog.empty_log().result() is True and not log.stat().st_size
    catalog.close()
    with pytest.raises(UnavailableError):
        catalog.empty_log()


def test_documents_are_found_by_id_without_reading_their_namespace(catalog: SqliteCatalog) -> None:
    for future in [catalog.put(document(str(n)), gradient(), None) for n in range(2000)]:
        future.result()
    steps: list[int] = []
    with catalog.view() as view:
        connection: sqlite3.Connection = view._connection.connection.driver_connection  # type: ignore[assignment]
        connection.set_progress_handler(lambda: steps.append(100), 100)
        for as_of in (None, 2000):
            assert view.began("n", ["5", "7", "11", "none"], as_of) == {"5": 6, "7": 8, "11": 12}
        connection.set_progress_handler(None, 0)
    assert sum(steps) < 2000, "instructions of SQLite's machine, several for each row that it reads"
