from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.sqlite.catalog import SqliteCatalog
from bank_service.errors import (
    CollectionMismatchError,
    InternalError,
    NotFoundError,
    UnavailableError,
    VersionConflictError,
)
from bank_service.values.documents import Document, Gradient, Outcome

IDENTITY = CollectionIdentity("a" * 64, "b" * 16, "int8", "an embedder", 4)


def gradient(digit: str = "0") -> Gradient:
    return Gradient(digit * 64, 100, 3, False, np.full(4, 0.5, "<f4").tobytes())


def document(id: str = "a", text: str = "text", namespace: str = "n") -> Document:
    return Document(namespace, id, "", text)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[SqliteCatalog]:
    opened = SqliteCatalog(tmp_path / "catalog.sqlite", IDENTITY)
    yield opened
    opened.close()


def test_commits_are_durable_by_the_database_settings(catalog: SqliteCatalog) -> None:
    with catalog.view() as view:
        assert view._connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert view._connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_a_catalog_opened_anew_has_its_documents_and_its_identity(tmp_path: Path) -> None:
    first = SqliteCatalog(tmp_path / "catalog.sqlite", IDENTITY)
    put = first.put(document(), gradient(), None).result()
    first.close()
    second = SqliteCatalog(tmp_path / "catalog.sqlite", IDENTITY)
    with second.view() as view:
        assert view.get("n", "a") == put.stored
    assert second.collection_id == first.collection_id
    second.close()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"learner_fingerprint": "c" * 64}, ("a" * 64, "c" * 64)),
        ({"layout_id": "d" * 16}, ("b" * 16, "d" * 16)),
        ({"codec": "bf16"}, ("int8", "bf16")),
        ({"embedder": "another"}, ("an embedder", "another")),
        ({"embedding_dimension": 5}, ("4", "5")),
    ],
)
def test_another_collection_is_refused_with_both_names(
    tmp_path: Path, change: dict[str, object], names: tuple[str, str]
) -> None:
    SqliteCatalog(tmp_path / "catalog.sqlite", IDENTITY).close()
    with pytest.raises(CollectionMismatchError) as caught:
        SqliteCatalog(tmp_path / "catalog.sqlite", replace(IDENTITY, **change))  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in names)


def test_a_view_does_not_move_with_later_writes(catalog: SqliteCatalog) -> None:
    catalog.put(document(), gradient(), None).result()
    with catalog.view() as view:
        assert view.sequence() == 1
        catalog.put(document(text="other"), gradient("1"), None).result()
        stored = view.get("n", "a")
        assert stored is not None and (stored.version, stored.document.text, view.sequence()) == (1, "text", 1)
    with catalog.view() as view:
        assert view.sequence() == 2


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


def test_a_database_that_cannot_be_written_is_unavailable_not_acknowledged(tmp_path: Path) -> None:
    catalog = SqliteCatalog(tmp_path / "catalog.sqlite", IDENTITY)

    def refuse(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA query_only=ON")

    catalog._writer.submit(refuse).result()
    with pytest.raises(UnavailableError, match="must be writable"):
        catalog.put(document(), gradient(), None).result()
    with catalog.view() as view:
        assert view.sequence() == 0
    catalog.close()


def test_writes_that_fail_together_have_an_error_each(catalog: SqliteCatalog) -> None:
    started, gate = threading.Event(), threading.Event()

    def wait(connection: sa.Connection) -> None:
        started.set()
        assert gate.wait(10)

    def refuse(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA query_only=ON")

    catalog._writer.submit(wait)
    assert started.wait(10)
    futures = [catalog._writer.submit(refuse), *(catalog.put(document(id), gradient(), None) for id in "ab")]
    gate.set()
    errors = [future.exception(10) for future in futures]
    assert all(isinstance(error, UnavailableError) for error in errors)
    assert len({id(error) for error in errors}) == 3


def test_changes_show_each_document_once_in_order(catalog: SqliteCatalog) -> None:
    for id in "abc":
        catalog.put(document(id), gradient(), None).result()
    catalog.put(document("a", "other"), gradient("1"), None).result()
    catalog.delete("n", "b", None).result()
    with catalog.view() as view:
        changes = view.changes(0, 10)
        assert [change.sequence for change in changes] == [3, 4, 5]
        assert [change.embedding is None for change in changes] == [False, False, True]
        assert view.changes(3, 1) == changes[1:2]
        assert view.changes(5, 10) == []


def test_a_deleted_documents_text_is_gone_from_the_file(tmp_path: Path) -> None:
    catalog = SqliteCatalog(tmp_path / "catalog.sqlite", IDENTITY)
    catalog.put(document(text="a very secret sentence"), gradient(), None).result()
    catalog.delete("n", "a", 1).result()
    with pytest.raises(NotFoundError):
        catalog.delete("n", "a", None).result()
    catalog.close()
    connection = sqlite3.connect(tmp_path / "catalog.sqlite")
    assert connection.execute("SELECT deleted, text, embedding FROM versions").fetchall() == [(1, "", None)]
    connection.close()
    assert b"secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_a_closed_catalog_takes_no_writes(tmp_path: Path) -> None:
    catalog = SqliteCatalog(tmp_path / "catalog.sqlite", IDENTITY)
    catalog.close()
    with pytest.raises(UnavailableError):
        catalog.put(document(), gradient(), None)
