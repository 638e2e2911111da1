"""Several banks with one catalog: who does what, and which gradients stay, whoever loses its connection or ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import NextLearner
from bank_service.catalog.factory import check_place
from bank_service.catalog.postgres import postgres_writer
from bank_service.errors import BankInUseError, CatalogReadError, CollectionMismatchError, UnavailableError
from bank_service.values.documents import PutResult
from bank_service.values.namespace_limits import NamespaceLimits
from benchmarks.servers.postgres_server import PostgresServer
from tests.bank.catalog.postgres.conftest import DIGEST, Line, Opener, decided, nodes_of, put, until
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient


def end_connections(url: str, locked: str = "true") -> int:
    """Ends connections of banks that have an advisory lock; those for which a condition on pg_locks holds."""
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(
            "SELECT pg_terminate_backend(pid) FROM (SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' "
            f"AND pid <> pg_backend_pid() AND {locked}) AS found"
        ).rowcount


def test_changes_of_all_nodes_are_in_one_order_and_each_sees_them_all(opener: Opener) -> None:
    first, second = opener(), opener()
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda n: put((first, second)[n % 2], f"d{n % 7}", f"{n % 10}", f"new{n % 3}"), range(80))
        )
    assert sorted(result.stored.sequence for result in results if result.outcome.name != "UNCHANGED") == list(
        range(1, 1 + sum(result.outcome.name != "UNCHANGED" for result in results))
    )
    for catalog in (first, second):
        with catalog.view() as view:
            assert sum(len(view.page(f"new{number}", "", 99)) for number in range(3)) == 21
    last = put(first, "last", "a")
    with second.view() as view:
        assert view.get("n", "last") == last.stored


def test_of_two_nodes_that_expect_the_same_version_one_writes(opener: Opener) -> None:
    catalogs = [opener(), opener()]
    put(catalogs[0], "a")
    with ThreadPoolExecutor(8) as pool:
        for version in range(1, 11):
            digit = f"{version % 10}"

            def write(catalog: Catalog, expected: int = version, digit: str = digit) -> PutResult:
                with nodes_of(catalog).held(digit * 64):
                    nodes_of(catalog).keep(digit * 64)
                    return catalog.put(document("a", f"text {expected}"), gradient(digit), expected).result()

            outcomes = [pool.submit(write, catalog).exception() for catalog in catalogs]
            assert [type(outcome).__name__ for outcome in outcomes].count("VersionConflictError") == 1
    with catalogs[1].view() as view:
        stored = view.get("n", "a")
        assert stored is not None and stored.version == 11


def test_a_quota_holds_over_all_nodes(opener: Opener) -> None:
    limits = NamespaceLimits(max_documents=10)
    catalogs = [opener(limits_of=lambda _: limits) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(put, catalogs[n % 2], f"d{n}", f"{n % 10}") for n in range(40)]
        refused = [type(result.exception()).__name__ for result in results if result.exception() is not None]
    assert refused == ["QuotaExceededError"] * 30
    with catalogs[0].view() as view:
        assert view.usage("n").num_documents == len(view.page("n", "", 99)) == 10


def test_a_bank_with_its_gradients_in_a_folder_is_alone(opener: Opener, tmp_path: Path, url: str) -> None:
    shared = opener()
    with pytest.raises(BankInUseError, match="only where the gradients of all lie in one object store"):
        opener(is_shared=False)
    check_place(tmp_path, url, is_shared=True)
    shared.close()
    alone = opener(is_shared=False)
    assert alone.nodes is None
    for begin in (opener, lambda: check_place(tmp_path, url, is_shared=True)):
        with pytest.raises(BankInUseError, match="another bank has this catalog"):
            begin()


def test_a_write_without_a_hold_is_refused_unless_a_version_has_its_gradient(opener: Opener) -> None:
    first, second = opener(), opener()
    with pytest.raises(UnavailableError, match="must stay while its document is written"):
        first.put(document(), gradient(), None).result()
    put(first, "a")
    assert second.put(document("b"), gradient(), None).result().stored.sequence == 2
    first.delete("n", "a", None).result()
    second.delete("n", "b", None).result()
    with pytest.raises(UnavailableError, match="another node has changed the document"):
        first.put(document(), gradient(), None).result()


def test_a_write_whose_hold_was_lost_is_refused_and_the_next_one_is_not(opener: Opener, url: str) -> None:
    """Another node could have removed the gradient meanwhile."""
    first, second = opener(), opener()
    with nodes_of(first).held(DIGEST):
        nodes_of(first).keep(DIGEST)
        assert end_connections(url, "mode = 'ShareLock' AND objsubid = 1") == 1
        while not (decision := nodes_of(second).begin_removal([DIGEST])).going:  # the test's own limit ends it
            time.sleep(0.05)
        nodes_of(second).end_removal(decision, [DIGEST])
        with pytest.raises(UnavailableError, match="its hold was lost"):
            first.put(document(), gradient(), None).result()
        with pytest.raises(UnavailableError, match="its hold was lost|must give locks"):
            nodes_of(first).keep(DIGEST)
    assert put(first, "a").stored.sequence == 1


def is_in_doubt(catalog: Catalog) -> bool:
    try:
        with catalog.view():
            return False
    except CatalogReadError as error:
        return "a commit without an answer" in str(error)


def test_a_commit_without_an_answer_keeps_its_gradient_from_removals(
    opener: Opener, url: str, own_server: PostgresServer, line: Line
) -> None:
    first, second = opener(url=line.url(url)), opener()
    put(first, "a", "1")
    with nodes_of(first).held(DIGEST):
        nodes_of(first).keep(DIGEST)
        line.cut_at_commit, line.is_broken = "after", True
        written = first.put(document("b"), gradient(), None)
        until(lambda: line.cut_at_commit is None)
        assert decided(second, [DIGEST]) == (set(), set())
        until(lambda: is_in_doubt(first))
        assert not written.done()
        line.is_broken = False
        assert written.result(20).stored.sequence == 2


def test_one_node_does_the_upkeep_and_another_takes_it_over(opener: Opener, url: str) -> None:
    first, second, third = opener(), opener(), opener()
    assert [nodes_of(catalog).leads for catalog in (first, second, third)] == [True, False, False]
    first.close()
    begun = time.monotonic()
    until(lambda: nodes_of(second).leads != nodes_of(third).leads)
    assert time.monotonic() - begun < 15, "within seconds"
    leader, other = (second, third) if nodes_of(second).leads else (third, second)
    (ended,) = nodes_of(leader).ended()
    nodes_of(leader).remember_ended([ended])
    assert nodes_of(leader).ended() == nodes_of(other).ended() == []
    end_connections(url)
    until(lambda: not nodes_of(leader).leads or nodes_of(other).leads)
    until(lambda: nodes_of(leader).leads != nodes_of(other).leads)
    assert put(leader, "a").stored.sequence == 1


def test_a_node_whose_writer_fails_leaves_the_upkeep_to_another_one(
    opener: Opener, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_writer, "FAILING_SECONDS", 0.5)
    first = opener()
    with (
        ThreadPoolExecutor(1) as pool,
        psycopg.connect(url, autocommit=True) as thief,
        psycopg.connect(url, autocommit=True) as watch,
    ):
        ((node,),) = watch.execute("SELECT node FROM nodes").fetchall()
        second = opener()
        of_node = f"((classid::bigint << 32) | objid::bigint) = {node}"
        taking = pool.submit(thief.execute, f"SELECT pg_advisory_lock({node})")
        until(lambda: watch.execute(f"SELECT FROM pg_locks WHERE {of_node} AND NOT granted").rowcount == 1)
        assert end_connections(url, f"{of_node} AND granted") == 1
        taking.result()
        until(lambda: nodes_of(second).leads and not nodes_of(first).leads)
    until(lambda: first.finish_erasures([]).exception() is None)


def test_only_a_node_that_is_alone_changes_what_the_others_know(opener: Opener) -> None:
    first, second = opener(), opener()
    learner = NextLearner("c" * 64, "d" * 16, "/learner")
    for change in (lambda: first.begin_recoding("factors-2-1-8"), lambda: second.begin_next(learner)):
        with pytest.raises(UnavailableError, match="only be changed by a node that is alone"):
            change().result()
    with pytest.raises(BankInUseError, match="history_seconds must be 0 as on the other nodes"):
        opener(history_seconds=5)
    second.close()
    first.begin_recoding("factors-2-1-8").result()
    changed = replace(IDENTITY, codec="factors-2-1-8")
    with pytest.raises(BankInUseError, match="on its way to another codec"):
        opener(identity=changed)
    first.end_recoding().result()
    with pytest.raises(CollectionMismatchError):
        opener()
    assert nodes_of(opener(identity=changed)).leads is False
    put(first, "a")


def test_a_node_that_missed_a_change_stops(opener: Opener, url: str, line: Line) -> None:
    first = opener(url=line.url(url))
    put(first, "a")
    line.is_broken = True
    assert end_connections(url) == 2
    second = opener()
    second.begin_recoding("factors-2-1-8").result()
    line.is_broken = False

    def is_stopped() -> bool:
        try:
            with first.view():
                return False
        except CatalogReadError as error:
            return "start this node again" in str(error)

    until(is_stopped)
    assert "start this node again" in str(first.put(document(), gradient(), None).exception())
    until(lambda: nodes_of(second).leads and not nodes_of(first).leads)
    put(second, "b")


def test_a_node_that_missed_the_way_back_to_settings_that_it_once_knew_stops(
    opener: Opener, url: str, line: Line
) -> None:
    first = opener(url=line.url(url))
    first.begin_recoding("factors-2-1-8").result()
    first.end_recoding().result()
    nodes_of(first).ended()  # another transaction, of whatever kind
    line.is_broken = True
    end_connections(url)
    second = opener(identity=replace(IDENTITY, codec="factors-2-1-8"))
    second.begin_recoding(IDENTITY.codec).result()
    second.end_recoding().result()
    line.is_broken = False
    until(lambda: not nodes_of(first).is_current)


def test_a_node_whose_connections_broke_goes_on_also_if_another_one_began_alone(
    opener: Opener, url: str, line: Line
) -> None:
    first = opener(url=line.url(url))
    nodes_of(first).take_objects(lambda *_: None)
    before = nodes_of(first).objects_name()
    line.is_broken = True
    end_connections(url)
    second = opener()
    taken: list[str] = []
    nodes_of(second).take_objects(lambda name, _: taken.append(name))
    line.is_broken = False
    assert taken != [before], "it may be another copy of the database"
    until(lambda: first.put(document(), gradient("1"), None).exception() is not None)
    until(lambda: nodes_of(first).objects_name() == taken[0])
    assert put(first, "a").stored.sequence == 1


def test_two_nodes_begin_one_new_catalog_at_once(opener: Opener) -> None:
    gate = threading.Barrier(4)

    def begin(_: int) -> Catalog:
        gate.wait()
        return opener()

    with ThreadPoolExecutor(4) as pool:
        catalogs = list(pool.map(begin, range(4)))
    assert len({catalog.collection_id for catalog in catalogs}) == 1
    assert [nodes_of(catalog).leads for catalog in catalogs].count(True) == 1
    names: list[str] = []
    for catalog in catalogs:
        nodes_of(catalog).take_objects(lambda name, _: names.append(name))
    assert [nodes_of(catalog).objects_name() for catalog in catalogs] == names * 4, "only the first took the store"
