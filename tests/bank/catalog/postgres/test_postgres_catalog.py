"""Tests of PostgreSQL alone: whose catalog it is, and what goes on when its server is away."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from bank_service.catalog.contract import Catalog
from bank_service.catalog.factory import check_place, open_catalog
from bank_service.catalog.postgres import membership, postgres_writer
from bank_service.errors import (
    BankInUseError,
    CatalogDamagedError,
    CatalogReadError,
    CollectionMismatchError,
    NotFoundError,
    UnavailableError,
    VersionConflictError,
)
from bank_service.values.documents import Outcome
from bank_service.values.filters import Condition, Operator
from benchmarks.servers.postgres_server import PostgresServer
from tests.bank.catalog.postgres.conftest import Line
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient


def count(catalog: Catalog) -> int:
    with catalog.view() as view:
        return len(view.page("n", "", 1000))


def until_it_works(work: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            work()
            return
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_catalog_belongs_to_one_bank_until_that_bank_ends(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "TAKE_SECONDS", 0.3)
    first = open_catalog(tmp_path, IDENTITY, url=url)
    for begin in (partial(check_place, tmp_path, url), partial(open_catalog, tmp_path, IDENTITY, url=url)):
        with pytest.raises(BankInUseError, match="another bank has this catalog"):
            begin()
    assert first.put(document(), gradient(), None).result().outcome is Outcome.CREATED
    first.close()
    open_catalog(tmp_path, IDENTITY, url=url).close()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "two"


def test_a_folder_never_meets_another_catalog(folders: tuple[Path, Path], own_server: PostgresServer) -> None:
    """Else the first sweep would remove its gradients."""
    one, two = folders
    url, other = own_server.new_schema(), own_server.new_schema()
    open_catalog(one, IDENTITY, url=url).close()
    open_catalog(two, IDENTITY, url=other).close()
    for folder, wrong in ((one, other), (two, url)):
        with pytest.raises(CollectionMismatchError, match="belongs to the collection"):
            open_catalog(folder, IDENTITY, url=wrong)
    with pytest.raises(CollectionMismatchError, match="name it with --catalog"):
        open_catalog(one, IDENTITY)
    with pytest.raises(CollectionMismatchError, match="name it with --catalog"):
        check_place(one)
    check_place(one, url)
    open_catalog(one, IDENTITY, url=url).close()


def test_a_catalog_is_in_the_first_schema_of_the_search_path(
    folders: tuple[Path, Path], own_server: PostgresServer
) -> None:
    """Banks with different first schemas have different locks."""
    url = own_server.new_schema()
    open_catalog(folders[0], IDENTITY, url=url).close()
    first, second = (re.findall(r"search_path%3D(\w+?)%2C", each)[0] for each in (url, own_server.new_schema()))
    with pytest.raises(RuntimeError, match=f"got that of the schema {first} behind {second}"):
        open_catalog(folders[1], IDENTITY, url=url.replace(first, f"{second}%2C{first}"))
    assert not list(folders[1].iterdir())
    with pytest.raises(RuntimeError, match="a schema of search_path must be in the database"):
        open_catalog(folders[1], IDENTITY, url=url.replace(f"{first}%2Cpublic", "nowhere"))


def test_a_commit_that_the_server_lost_is_told_from_one_that_came_through(tmp_path: Path, url: str) -> None:
    """A server that lost the end of its log gives the same transaction number to somebody else."""
    catalog = open_catalog(tmp_path, IDENTITY, url=url)
    catalog.put(document("a"), gradient(), None).result()
    writer = catalog._writer  # type: ignore[attr-defined]
    with psycopg.connect(url, autocommit=True) as connection:
        ((stored,),) = connection.execute("SELECT token FROM nodes").fetchall()
        for token, was_committed in ((stored, True), ("lost", False)):
            writer._in_doubt = token
            assert writer._settled() is was_committed and not writer.is_in_doubt
        assert catalog.put(document("a"), gradient(), None).result().outcome is Outcome.UNCHANGED
        assert connection.execute("SELECT token FROM nodes").fetchall() == [(stored,)], "nothing was written"
    catalog.close()


def test_a_folder_with_gradients_begins_no_catalog(folders: tuple[Path, Path], own_server: PostgresServer) -> None:
    one, two = folders
    (one / "blobs" / "ab").mkdir(parents=True)
    (one / "blobs" / "ab" / "cd").write_bytes(b"a gradient")
    url = own_server.new_schema()
    with pytest.raises(CatalogDamagedError, match="must name the gradients"):
        open_catalog(one, IDENTITY, url=url)
    open_catalog(two, IDENTITY, url=url).close()
    with pytest.raises(CatalogDamagedError, match="must name the gradients"):
        open_catalog(one, IDENTITY, url=url)


def test_a_folder_with_a_catalog_of_its_own_takes_no_other(tmp_path: Path, url: str) -> None:
    open_catalog(tmp_path, IDENTITY).close()
    with pytest.raises(CollectionMismatchError, match="leave --catalog out"):
        open_catalog(tmp_path, IDENTITY, url=url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://nobody@127.0.0.1:1/none?connect_timeout=2", "start PostgreSQL"),
        ("postgresql://nobody:secret@127.0.0.1:1/none?connect_timeout=2", "nobody:\\*\\*\\*@127.0.0.1"),
    ],
)
def test_a_server_that_is_not_there_stops_the_start_and_shows_no_password(
    tmp_path: Path, url: str, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=reason) as caught:
        check_place(tmp_path, url)
    assert "secret" not in str(caught.value)
    with pytest.raises(RuntimeError, match=reason):
        open_catalog(tmp_path, IDENTITY, url=url)


def test_a_database_that_was_dumped_and_restored_is_the_same_catalog(
    tmp_path: Path, own_server: PostgresServer
) -> None:
    url = own_server.new_database()
    first = open_catalog(tmp_path, IDENTITY, url=url)
    for number in range(20):
        first.put(document(str(number), f"the owl {number}"), gradient(), None).result()
    assert first.vectors is not None and first.vectors.build_graphs(0) == 1
    first.close()
    second = open_catalog(tmp_path, IDENTITY, url=own_server.dumped_and_restored(url))
    assert second.collection_id == first.collection_id and second.vectors is not None
    with second.view() as view:
        assert view.sequence() == len(view.page("n", "", 99)) == 20
        assert list(second.words.best(view, "n", "7", (), 9)) == [8]
        assert len(second.vectors.nearest(view, "n", np.ones(4, np.float32), 99)) == 20
    assert second.vectors.build_graphs(0) == 0, "it has the graph"
    assert second.put(document("a", namespace="m"), gradient(), None).result().stored.sequence == 21
    second.close()


def test_a_nul_in_a_question_finds_nothing(catalog: Catalog) -> None:
    """No document has one, and PostgreSQL takes none."""
    catalog.put(document(metadata={"colour": "red"}), gradient(), None).result()
    cases = [("colour", ("red\0",), False), ("colour", ("\0", "red"), True), ("col\0", ("red",), False)]
    with catalog.view() as view:
        for key, values, is_equal in cases:
            for operator, expected in ((Operator.EQUALS, is_equal), (Operator.NOT_EQUALS, not is_equal)):
                assert bool(view.matching("n", [Condition(key, operator, values)])) is expected
        assert view.matching("n", [Condition("\0", Operator.PRESENT)]) == []
        assert len(view.matching("n", [Condition("\0", Operator.ABSENT)])) == 1
        assert view.page("n", "", 9, prefix="\0") == [] and view.page("n", "a\0", 9) == []
        assert len(view.page("n", "A\0", 9)) == 1


def test_reads_and_writes_go_on_after_the_server_was_away(own_server: PostgresServer, catalog: Catalog) -> None:
    catalog.put(document("before"), gradient(), None).result()
    assert count(catalog) == 1
    own_server.stop()
    started = time.monotonic()
    with pytest.raises(CatalogReadError, match="must be readable"):
        count(catalog)
    with pytest.raises(UnavailableError, match="must be writable"):
        catalog.put(document("lost"), gradient(), None).result()
    assert time.monotonic() - started < 15, "a caller is told soon"
    own_server.start()
    until_it_works(lambda: catalog.put(document("after"), gradient(), None).result())
    until_it_works(lambda: count(catalog))
    with catalog.view() as view:
        assert [entry.id for entry in view.page("n", "", 9)] == ["after", "before"] and view.sequence() == 2


def test_a_connection_that_the_server_ended_costs_no_call(own_server: PostgresServer, catalog: Catalog) -> None:
    catalog.put(document("a"), gradient(), None).result()
    assert count(catalog) == 1
    with psycopg.connect(own_server.new_schema(), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'regrad-bank'"
        )
    assert count(catalog) == 1, "a read takes a new connection"
    assert catalog.put(document("b"), gradient(), None).result().stored.sequence == 2
    assert count(catalog) == 2


def test_a_server_without_connections_to_spare_stops_reads_until_it_has_some(
    tmp_path: Path, own_server: PostgresServer
) -> None:
    url = own_server.new_schema()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 1")
        connection.execute("DO $$ BEGIN EXECUTE format('GRANT ALL ON SCHEMA %I TO few', current_schema()); END $$")
        catalog = open_catalog(tmp_path, IDENTITY, url=url.replace("user=postgres", "user=few"))
        with pytest.raises(CatalogReadError, match="must be readable"):
            count(catalog)
        assert catalog.put(document("a"), gradient(), None).result().outcome is Outcome.CREATED
        connection.execute("ALTER ROLE few CONNECTION LIMIT 9")
        assert count(catalog) == 1
        catalog.close()


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_write_whose_commit_had_no_answer_is_done_once(
    tmp_path: Path, own_server: PostgresServer, line: Line, cut: str
) -> None:
    catalog = open_catalog(tmp_path, IDENTITY, url=line.url(own_server.new_schema()))
    catalog.put(document("a"), gradient(), None).result()
    line.cut_at_commit = cut
    put = catalog.put(document("b"), gradient(), None).result(20)
    assert line.cut_at_commit is None, "else this test shows nothing"
    assert (put.outcome, put.stored.sequence) == (Outcome.CREATED, 2)
    with catalog.view() as view:
        assert [entry.id for entry in view.page("n", "", 9)] == ["a", "b"]
    assert catalog.put(document("c"), gradient(), None).result().stored.sequence == 3
    catalog.close()


def test_writes_that_fail_beside_a_broken_commit_fail_once(
    tmp_path: Path, own_server: PostgresServer, line: Line
) -> None:
    catalog = open_catalog(tmp_path, IDENTITY, url=line.url(own_server.new_schema()))
    catalog.put(document("a"), gradient(), None).result()
    gate = threading.Event()
    armed: list[str] = []

    def arm(_: sa.Connection) -> None:
        if not armed:  # it runs again with the others
            line.cut_at_commit = "before"
            armed.append("now")

    catalog._writer.submit(lambda connection: gate.wait(10))  # type: ignore[attr-defined]
    catalog._writer.submit(arm)  # type: ignore[attr-defined]
    puts = [catalog.put(document(id), gradient(), None) for id in "bc"]
    refused = [catalog.put(document("a", "other"), gradient("1"), 7), catalog.delete("n", "none", None)]
    gate.set()
    assert {put.result(20).stored.sequence for put in puts} == {2, 3}
    assert isinstance(refused[0].exception(20), VersionConflictError)
    assert isinstance(refused[1].exception(20), NotFoundError)
    assert catalog.put(document("d"), gradient(), None).result().stored.sequence == 4
    assert armed and line.cut_at_commit is None
    catalog.close()


def test_a_commit_in_doubt_stops_readers_until_the_server_has_told(
    tmp_path: Path, own_server: PostgresServer, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_writer, "SETTLE_SECONDS", 0.2)
    catalog = open_catalog(tmp_path, IDENTITY, url=line.url(own_server.new_schema()))
    assert count(catalog) == 0
    line.cut_at_commit = "after"
    line.is_broken = True
    with pytest.raises(UnavailableError):
        catalog.put(document("b"), gradient(), None).result(20)
    with pytest.raises(CatalogReadError, match="commit without an answer"):
        count(catalog)
    line.is_broken = False
    until_it_works(lambda: count(catalog))
    assert count(catalog) == 1
    catalog.close()
