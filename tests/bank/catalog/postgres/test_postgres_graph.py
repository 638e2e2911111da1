"""The graphs of vectors in PostgreSQL: when they are built, and that searches use them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.factory import open_catalog
from bank_service.catalog.postgres import connect, vector_search
from bank_service.values.filters import Condition, Operator
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient


def test_a_graph_waits_for_older_transactions_and_a_failed_one_is_still_lacking(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "_SESSION", (*connect._SESSION, "SET lock_timeout = 100"))
    catalog = open_catalog(tmp_path, IDENTITY, url=url)
    catalog.put(document(), gradient(), None).result()
    assert catalog.vectors is not None
    with monkeypatch.context() as patch, psycopg.connect(url, autocommit=True) as connection:
        patch.setattr(vector_search, "GRAPH", {"m": "no number"})
        for _ in range(2):
            assert catalog.vectors.build_graphs(0) == 1
        assert connection.execute("SELECT to_regclass('vectors_1_hnsw')").fetchall() == [(None,)]
    with psycopg.connect(url) as reader, ThreadPoolExecutor() as pool:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("SELECT count(*) FROM vectors_1")
        built = pool.submit(catalog.vectors.build_graphs, 0)
        time.sleep(1)
        assert not built.done(), "it waits for the reader"
        reader.commit()
        assert built.result(20) == 1
    assert catalog.vectors.build_graphs(0) == 0
    catalog.close()


def test_a_graph_that_another_node_builds_is_left_alone(catalog: Catalog, url: str) -> None:
    catalog.put(document(), gradient(), None).result()
    assert catalog.vectors is not None
    with psycopg.connect(url, autocommit=True) as other:
        (is_taken,) = other.execute(vector_search._TAKE.format(number=1)).fetchone() or ()
        assert is_taken
        assert catalog.vectors.build_graphs(0) == 1
        assert other.execute("SELECT to_regclass('vectors_1_hnsw')").fetchall() == [(None,)]
    deadline = time.monotonic() + 20  # the server frees the lock with a delay
    while catalog.vectors.build_graphs(0):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with psycopg.connect(url) as other:
        assert other.execute("SELECT to_regclass('vectors_1_hnsw')").fetchall() == [("vectors_1_hnsw",)]


def test_a_large_namespace_gets_a_graph_and_is_searched_by_it(
    catalog: Catalog, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.put(document(), gradient(), None).result()
    assert catalog.vectors is not None
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(  # faster than by ``put``
            "INSERT INTO vectors_1 SELECT 1, n, n, jsonb_build_object('colour', (n % 2)::text), "
            "ARRAY[random() - 0.5, random() - 0.5, random() - 0.5, random() - 0.5]::vector::halfvec "
            "FROM generate_series(2, 30000) AS n"
        )
        connection.execute("UPDATE namespace_usage SET num_documents = 30000")
        connection.execute("VACUUM ANALYZE vectors_1")
        assert catalog.vectors.build_graphs(30_000) == 0, "it is not larger than that"
        assert catalog.vectors.build_graphs(2_000) == 1
        assert catalog.vectors.build_graphs(2_000) == 0, "it has one"

        def num_scans() -> int:
            found = connection.execute(
                "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'vectors_1_hnsw'"
            )
            return sum(number for (number,) in found)

        red = Condition("colour", Operator.EQUALS, ("1",))  # more documents than are compared one by one
        for conditions in ((), (red,)):
            before, deadline = num_scans(), time.monotonic() + 20
            with catalog.view() as view:
                vector = np.asarray([1, 0, 0, 0], np.float32)
                keys = catalog.vectors.nearest(view, "n", vector, 20, conditions)
            assert len(keys) == 20 and (not conditions or {key % 2 for key in keys} == {1})
            while num_scans() == before:  # the server counts with a delay
                assert time.monotonic() < deadline, "no graph was searched"
                time.sleep(0.05)
        connection.execute("DELETE FROM vectors_1 WHERE key = ANY(%s)", [_nearest(connection, 1_000)])
        monkeypatch.setattr(vector_search._Search, "exactly", None)
        with catalog.view() as view:
            keys = catalog.vectors.nearest(view, "n", np.asarray([1, 0, 0, 0], np.float32), 20)
        assert len(set(keys) & set(_nearest(connection, 20))) > 15


def _nearest(connection: psycopg.Connection[Any], count: int) -> list[int]:
    """By exact comparison."""
    with connection.transaction():
        connection.execute("SET LOCAL enable_indexscan = off")
        near = "SELECT key FROM vectors_1 ORDER BY embedding <=> '[1, 0, 0, 0]'::halfvec LIMIT %s"
        return [key for (key,) in connection.execute(near, [count])]
