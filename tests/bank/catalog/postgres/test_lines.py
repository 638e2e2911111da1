"""Connections that are ended while other threads wait at them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from bank_service.catalog.postgres.connect import reader_of
from bank_service.catalog.postgres.lines import Lines
from tests.bank.postgres_server import shared_server

WAITS = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query LIKE '%of a test%'"


def test_a_connection_that_is_still_being_set_up_is_cut_and_forgotten(pool: ThreadPoolExecutor) -> None:
    url = shared_server().new_schema()
    engine, lines = reader_of(url), Lines()
    hangs = [True]

    def set_up(connection: Any, _record: object) -> None:
        if hangs[0]:
            try:
                connection.execute("SELECT pg_sleep(60) -- of a test")
            except psycopg.OperationalError:
                connection.close()
                raise

    sa.event.listen(engine, "connect", set_up)
    lines.follow(engine)
    connecting = pool.submit(engine.connect)
    with psycopg.connect(url, autocommit=True) as watcher:
        while not watcher.execute(WAITS).fetchone():  # the test's own limit ends it
            time.sleep(0.01)
    lines.cut()
    with pytest.raises(sa.exc.OperationalError):
        connecting.result(20)
    hangs[0] = False
    with engine.connect():
        assert len(lines._lines) == 1
    lines.close()
    engine.dispose()
