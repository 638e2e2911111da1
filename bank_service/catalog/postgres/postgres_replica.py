"""Reads of a streaming replica of the catalog's server.

How old a state is, is measured with the clock of this process alone. A thread asks the primary for its last sequence
now and then, and notes the time. A state of the replica that has this sequence has every change until then. Each view
reads its own sequence in its first statement, so it is right also where a URL leads to several replicas.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import itemgetter

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import error_name, name_for_log, reader_of
from bank_service.catalog.postgres.lines import Lines
from bank_service.catalog.postgres.replica_check import NotReplicatingError, check_standby, place_of
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
# The last two change without a new sequence.
_STATE = (
    "SELECT sequence, pg_is_in_recovery(), learner_fingerprint, (SELECT version FROM words_version) FROM collection"
)


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
        self._made_with: tuple[str | None, ...] = ()  # the primary's learner and version of words, at the last mark
        self._not_before = 0.0  # marks from before don't count
        self._fresh_at: float | None = None
        self._looking_since: float | None = None  # at the replica
        self._failures = Seldom()
        self._lines = Lines()
        with primary.connect() as connection:
            self._place = place_of(connection)
        self._engine = reader_of(settings.url)
        self._lines.follow(self._engine)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bank-replica", daemon=True)
        threading.Thread(target=self._watch, name="bank-replica-watch", daemon=True).start()
        try:
            self._look()
        except BaseException:
            self._stopped.set()
            self._engine.dispose()
            raise
        self._thread.start()

    @property
    def staleness_seconds(self) -> float | None:
        return None if self._fresh_at is None else time.monotonic() - self._fresh_at

    def leave_past(self) -> None:
        """The collection has another learner. From now on no view is of a state from before."""
        self._not_before = time.monotonic()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(1.0)  # a server that hangs must not hold up the stop
        self._lines.close()
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
                sequence, made_with = self._state(connection)
                outcome = "replica" if sequence >= needed and made_with == self._made_with else "behind"
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
        oldest = max(time.monotonic() - self._max_staleness, self._not_before)
        place = bisect_left(marks, oldest, key=itemgetter(1))
        return max(at_least, marks[place][0]) if place < len(marks) else None

    def _state(self, connection: sa.Connection) -> tuple[int, tuple[str | None, ...]]:
        """The last change of a state, and its learner and version of words.

        RuntimeError where the server is no replica of the catalog, or no longer one.
        """
        if not connection.info.get("is_checked"):
            check_standby(connection, self._url, self._place)
            connection.info["is_checked"] = True
        ((sequence, is_standby, learner, words),) = run_text(connection, _STATE)
        if not is_standby:
            raise NotReplicatingError("catalog_read must stay in recovery, it takes writes now")
        return int(sequence), (learner, words)

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self._max_staleness / LOOKS)):
            with suppress(RuntimeError):  # it is logged
                self._look()

    def _look(self) -> None:
        """Asks both servers. RuntimeError where the URL leads to another catalog's server."""
        try:
            read = time.monotonic()
            with self._primary.connect() as connection:
                ((sequence, _, learner, words),) = run_text(connection, _STATE)
        except sa.exc.SQLAlchemyError:
            return  # without marks, nothing is read here
        self._made_with = learner, words
        earlier = [mark for mark in self._marks if mark[0] < sequence]  # after a failover, sequences may be lower
        self._marks = (*earlier[-MAX_MARKS:], (int(sequence), read))
        self._looking_since = time.monotonic()
        try:
            with self._engine.begin() as connection:
                replayed, made_with = self._state(connection)
        except (sa.exc.SQLAlchemyError, RuntimeError) as error:
            self.is_up = False
            self._note_down(error)
            if isinstance(error, RuntimeError) and not isinstance(error, NotReplicatingError):
                raise
            return
        finally:
            self._looking_since = None
        self.is_up = True
        reads = [read for sequence, read in self._marks if sequence <= replayed]
        if reads and made_with == self._made_with:
            self._fresh_at = max(reads)

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            since = self._looking_since
            if since is not None and time.monotonic() - since > HANG_SECONDS:
                self._lines.cut()

    def _note_down(self, error: Exception) -> None:
        if not self._stopped.is_set() and self._failures.is_due():
            reason = str(error) if isinstance(error, RuntimeError) else name_for_log(error)
            logger.warning("the replica can't be read now: %s; reading the catalog itself", reason)
