"""The one writer of a catalog in PostgreSQL. It owns the catalog as long as its connection lives.

The connection has an advisory lock, which the server releases when the connection ends. So no two banks write at once:
whoever commits has the lock.

A connection may break during a commit. Then the server may have committed or not. The writer asks it, once it has the
lock again, because the old connection is over by then. So a write that came through is acknowledged, and no reader acts
on a state that may still change. Each transaction stores a random token, and the stored one tells which came through.
PostgreSQL's own transaction numbers don't: a server that lost the end of its log gives a number out twice.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import error_name
from bank_service.catalog.sql.group_commit import GroupCommit
from bank_service.catalog.sql.prepared import run_text
from bank_service.errors import BankInUseError
from bank_service.runtime.seldom import Seldom

logger = logging.getLogger(__name__)

TAKE_SECONDS = 3.0  # time for the server to notice that the connection of a killed bank is gone
SETTLE_SECONDS = 3.0  # the longest that a broken commit makes its callers wait for the server
_PAUSE_SECONDS = 0.1
# A catalog is a schema of a database, and the lock is one of the database.
_TAKE = "SELECT pg_try_advisory_lock(hashtext('regrad bank'), hashtext(current_schema()))"
# Only where the transaction has written something, so that one without changes needs no commit to the disk.
_SIGN = "UPDATE last_commit SET token = %(token)s WHERE pg_current_xact_id_if_assigned() IS NOT NULL RETURNING token"
_SIGNED = "SELECT token FROM last_commit"


class PostgresWriter(GroupCommit):
    """See ``GroupCommit``."""

    def __init__(self, engine: sa.Engine) -> None:
        """``engine``: with one connection, which takes the lock; see ``take_lock``."""
        self._in_doubt: str | None = None  # the token of a transaction whose commit had no answer
        self._is_asked = False  # a ``settle`` waits for its turn
        self._failures = Seldom()
        super().__init__(engine)

    @property
    def is_in_doubt(self) -> bool:
        """Whether a commit had no answer yet, so that the catalog's state isn't known."""
        return self._in_doubt is not None

    def settle(self) -> None:
        """Lets the writer ask for the commit that had no answer. Many readers may want that at a time."""
        if not self._is_asked:
            self._is_asked = True
            self.submit(lambda connection: None).add_done_callback(self._was_asked)

    def _was_asked(self, _: Future[None]) -> None:
        self._is_asked = False

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        if self._in_doubt is not None:
            self._settled()
        with self._engine.connect() as connection:
            transaction = connection.begin()
            try:
                yield connection
                signed = run_text(connection, _SIGN, {"token": secrets.token_hex(16)})
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
        logger.warning("a commit had no answer: %s; asking the server", error_name(broken))
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
            time.sleep(_PAUSE_SECONDS)

    def _settled(self) -> bool:
        """Whether the transaction in doubt was committed. It is no longer in doubt then."""
        with self._engine.begin() as connection:  # a new connection, which has taken the lock
            ((token,),) = run_text(connection, _SIGNED)
        was_committed = bool(token == self._in_doubt)
        self._in_doubt = None
        return was_committed

    def _wants_new_connection(self, error: Exception) -> bool:
        """The server undoes what it did for a connection that broke. In doubt, nobody knows."""
        return self._in_doubt is None and isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated

    def _unwritable(self, error: Exception) -> str:
        if self._failures.is_due():
            logger.warning("the catalog can't be written now: %s", error_name(error))
        if isinstance(error, BankInUseError):
            return str(error)
        return f"the catalog in PostgreSQL must be writable, got {error_name(error)}; try again"


def take_lock(connection: Any, _record: object = None) -> None:
    """Takes the catalog for a new connection of the driver's. BankInUseError where another bank has it.

    RuntimeError where no schema of the search path is there.
    """
    deadline = time.monotonic() + TAKE_SECONDS
    while not (is_taken := connection.execute(_TAKE).fetchone()[0]):
        if is_taken is None:
            connection.close()
            raise RuntimeError("a schema of search_path must be in the database, got none; CREATE SCHEMA makes one")
        if time.monotonic() > deadline:
            connection.close()
            raise BankInUseError(
                "another bank has this catalog in PostgreSQL; stop that bank, or name another database with --catalog"
            )
        time.sleep(_PAUSE_SECONDS)
