"""The writer of one node of a catalog in PostgreSQL, on a connection of its own; see ``membership``.

The connection may break during a commit. Then the server may have committed or not. The writer asks it on a new
connection, once that has the node's lock, because the old connection is over by then. So a write that came through is
acknowledged, and no reader of this node acts on a state that may still change. Each transaction stores a random token
in the node's row, and the stored one tells which came through. PostgreSQL's own transaction numbers don't: a server
that lost the end of its log gives a number out twice.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import error_name, name_for_log, state_of
from bank_service.catalog.postgres.membership import PAUSE_SECONDS, Membership
from bank_service.catalog.sql.group_commit import GroupCommit
from bank_service.catalog.sql.prepared import run_text
from bank_service.errors import BankInUseError
from bank_service.runtime.seldom import Seldom

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 3.0  # the longest that a broken commit makes its callers wait for the server
FAILING_SECONDS = 5.0  # a writer that has failed for so long leaves the upkeep to another node
_CONFLICTS = ("40001", "40P01")  # a serialization failure, a deadlock
# Only where the transaction has written something, so that one without changes needs no commit to the disk.
_SIGN = (
    "INSERT INTO nodes (node, token, is_over, seen) SELECT %(node)s, %(token)s, false, now() "
    "WHERE pg_current_xact_id_if_assigned() IS NOT NULL ON CONFLICT (node) "
    "DO UPDATE SET token = excluded.token, is_over = false, seen = excluded.seen RETURNING token"
)
_SIGNED = "SELECT token FROM nodes WHERE node = %(node)s"


class PostgresWriter(GroupCommit):
    """See ``GroupCommit``."""

    def __init__(self, engine: sa.Engine, membership: Membership) -> None:
        """``engine``: with one connection, which has entered the membership."""
        self._membership = membership
        self._in_doubt: str | None = None  # the token of a transaction whose commit had no answer
        self._is_asked = False  # a ``settle`` waits for its turn
        self._failing_since: float | None = None  # the first ``settle`` that failed, if none has succeeded after it
        self._failures = Seldom()
        super().__init__(engine)

    @property
    def is_in_doubt(self) -> bool:
        """Whether a commit had no answer yet, so that the catalog's state isn't known."""
        return self._in_doubt is not None

    @property
    def is_failing(self) -> bool:
        """Whether each ``settle`` of the last FAILING_SECONDS has failed."""
        since = self._failing_since
        return since is not None and time.monotonic() > since + FAILING_SECONDS

    def settle(self) -> None:
        """Lets the writer look at its connection, and ask for the commit that had no answer. Many may want that at a
        time. UnavailableError after ``close``."""
        if not self._is_asked:
            self._is_asked = True
            self.submit(lambda connection: None).add_done_callback(self._was_asked)

    def _was_asked(self, settled: Future[None]) -> None:
        if settled.exception() is None:
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = time.monotonic()
        self._is_asked = False

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        if self._in_doubt is not None:
            self._settled()
        with self._engine.connect() as connection:
            transaction = connection.begin()
            try:
                self._membership.check(connection)
                yield connection
                signed = run_text(connection, _SIGN, {"node": self._membership.node, "token": secrets.token_hex(16)})
            except BaseException:
                transaction.rollback()
                raise
            try:
                transaction.commit()
                return
            except sa.exc.DBAPIError as error:
                broken = error
                broken.connection_invalidated = True
                connection.invalidate(error)
                self._in_doubt = signed[0][0] if signed else None
        logger.warning("a commit had no answer: %s; asking the server", name_for_log(broken))
        self._engine.dispose()
        if not signed or not self._settled_soon():
            raise broken

    def _settled_soon(self) -> bool:
        """Whether the transaction in doubt was committed. Its error where the server stays away."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                return self._settled()
            except (sa.exc.SQLAlchemyError, BankInUseError):
                if time.monotonic() > deadline:
                    raise
            time.sleep(PAUSE_SECONDS)

    def _settled(self) -> bool:
        """Whether the transaction in doubt was committed. It is no longer in doubt then."""
        with self._engine.begin() as connection:  # a new connection, which has taken the lock
            was_committed = run_text(connection, _SIGNED, {"node": self._membership.node}) == [(self._in_doubt,)]
        self._in_doubt = None
        return was_committed

    def _wants_new_connection(self, error: Exception) -> bool:
        """The server undoes what it did for a connection that broke, and what met a conflict. In doubt, nobody
        knows."""
        if self._in_doubt is not None or not isinstance(error, sa.exc.DBAPIError):
            return False
        return error.connection_invalidated or state_of(error) in _CONFLICTS

    def _unwritable(self, error: Exception) -> str:
        if self._failures.is_due():
            logger.warning("the catalog can't be written now: %s", name_for_log(error))
        if isinstance(error, BankInUseError):
            return str(error)
        return f"the catalog in PostgreSQL must be writable, got {error_name(error)}; try again"
