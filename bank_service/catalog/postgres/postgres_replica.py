"""Reads of a streaming replica of the catalog's server.

How old a state is, is measured with the clock of this process alone. A thread asks the primary for its last sequence
now and then, and notes the time. A state of the replica that has this sequence has every change until then. Each view
reads its own sequence in its first statement, so it is right also where a URL leads to several replicas.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import itemgetter
from typing import Any
from weakref import WeakSet

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import error_name, reader_of
from bank_service.catalog.postgres.replica_check import check_standby, place_of
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.prepared import run_text
from bank_service.catalog.sql.search_rows import SearchRows
from bank_service.errors import ReplicaReadError
from bank_service.runtime.seldom import Seldom
from bank_service.values.catalog_url import ReplicaSettings

logger = logging.getLogger(__name__)

LOOKS = 4  # at both servers, in the time that a state may be old
HANG_SECONDS = 3.0  # a replica without an answer for so long loses its connections
MAX_MARKS = 512
_STATE = "SELECT sequence, pg_is_in_recovery() FROM collection"


class PostgresReplica:
    """Implements ``nodes.Replica``."""

    def __init__(self, settings: ReplicaSettings, primary: sa.Engine, search_rows: SearchRows) -> None:
        """``primary``: of readers. RuntimeError where the URL leads to no replica of it. SQLAlchemyError where the
        primary can't be read."""
        self.counts: Counter[str] = Counter(replica=0, behind=0, down=0)
        self.is_up = False
        self._url = settings.url
        self._primary = primary
        self._search_rows = search_rows
        self._max_staleness = settings.max_staleness_ms / 1000
        self._marks: tuple[tuple[int, float], ...] = ()  # sequences of the primary, and when each was last read there
        self._fresh_at = time.monotonic()
        self._failures = Seldom()
        self._connections: WeakSet[Any] = WeakSet()  # the driver's
        self._engine = reader_of(settings.url)
        sa.event.listen(self._engine, "connect", lambda connection, _: self._connections.add(connection))
        with primary.connect() as connection:
            self._place = place_of(connection)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bank-replica", daemon=True)
        try:
            self._look()
        except BaseException:
            self._engine.dispose()
            raise
        self._thread.start()

    @property
    def staleness_seconds(self) -> float:
        return time.monotonic() - self._fresh_at

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(1.0)  # a server that hangs must not hold up the stop
        self._cut()
        self._engine.dispose()

    @contextmanager
    def view(self, at_least: int) -> Iterator[SqlView | None]:
        """None: the primary must be read. ReplicaReadError for a read that fails later."""
        is_open = False
        try:
            with ExitStack() as stack:
                view = self._opened(stack, at_least)
                is_open = view is not None
                yield view
        except sa.exc.SQLAlchemyError as error:
            if not is_open:
                raise
            self._note_down(error)
            raise ReplicaReadError(f"the replica must be readable, got {error_name(error)}; try again") from error

    def _opened(self, stack: ExitStack, at_least: int) -> SqlView | None:
        needed = self._needed(at_least)
        outcome = "down"
        if self.is_up and needed is not None:
            try:
                connection = stack.enter_context(self._engine.begin())
                sequence = self._sequence(connection)
                outcome = "replica" if sequence >= needed else "behind"
            except (sa.exc.SQLAlchemyError, RuntimeError) as error:
                self.is_up = False
                self._note_down(error)
        self.counts[outcome] += 1
        if outcome == "replica":
            return SqlView(connection, self._search_rows, sequence)
        with suppress(sa.exc.SQLAlchemyError):
            stack.close()
        return None

    def _needed(self, at_least: int) -> int | None:
        """The sequence that a state must have now. None where the primary hasn't told its own lately."""
        marks = self._marks
        place = bisect_left(marks, time.monotonic() - self._max_staleness, key=itemgetter(1))
        return max(at_least, marks[place][0]) if place < len(marks) else None

    def _sequence(self, connection: sa.Connection) -> int:
        """The last change of a state. RuntimeError where the server isn't a replica of the catalog, or not any more."""
        if not connection.info.get("is_checked"):
            check_standby(connection, self._url, self._place)
            connection.info["is_checked"] = True
        ((sequence, is_standby),) = run_text(connection, _STATE)
        if not is_standby:
            raise RuntimeError("catalog_read must stay in recovery, it takes writes now; its reads go to --catalog")
        return int(sequence)

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self._max_staleness / LOOKS)):
            with suppress(RuntimeError):  # it is logged
                self._look()

    def _look(self) -> None:
        """Asks both servers. RuntimeError where the URL leads to no replica of the catalog."""
        try:
            read = time.monotonic()
            with self._primary.connect() as connection:
                ((sequence, _),) = run_text(connection, _STATE)
        except sa.exc.SQLAlchemyError:
            return  # without marks, nothing is read here
        earlier = [mark for mark in self._marks if mark[0] < sequence]  # after a failover, sequences may be lower
        self._marks = (*earlier[-MAX_MARKS:], (int(sequence), read))
        cut = threading.Timer(HANG_SECONDS, self._cut)
        cut.start()
        try:
            with self._engine.begin() as connection:
                replayed = self._sequence(connection)
        except (sa.exc.SQLAlchemyError, RuntimeError) as error:
            self.is_up = False
            self._note_down(error)
            if isinstance(error, RuntimeError):
                raise
            return
        finally:
            cut.cancel()
        self.is_up = True
        self._fresh_at = max(self._fresh_at, *(read for sequence, read in self._marks if sequence <= replayed), 0.0)

    def _cut(self) -> None:
        """Ends all connections, so that nobody waits for a replica that hangs."""
        for connection in list(self._connections):
            # A connection that is closed has no socket.
            with suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)

    def _note_down(self, error: Exception) -> None:
        if not self._stopped.is_set() and self._failures.is_due():
            reason = str(error) if isinstance(error, RuntimeError) else error_name(error)
            logger.warning("the replica can't be read now: %s; reading the catalog itself", reason)
