"""The one writer of a SQLite catalog. It also empties the write-ahead log."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import closing

from sqlalchemy import Engine

from bank_service.catalog.sql.group_commit import GroupCommit
from bank_service.errors import UnavailableError

BUSY_MS = 500  # the longest that one checkpoint waits for readers; writes and new readers wait for it


class SqliteWriter(GroupCommit):
    """See ``GroupCommit``."""

    def __init__(self, engine: Engine) -> None:
        self._may_read = threading.Event()  # no checkpoint is under way
        self._may_read.set()
        super().__init__(engine)

    def checkpoint(self) -> Future[bool]:
        """Moves all commits into the database's file and empties the write-ahead log, which has older pages. False
        where a reader of an older state prevents it: try again."""
        future: Future[bool] = Future()
        self._put(lambda: self._checkpoint(future), future)
        return future

    def wait_to_read(self) -> None:
        """Waits for a checkpoint under way. Every reader calls it before it begins.

        Without it, overlapping readers would use the log all the time, and no checkpoint could empty it. It takes at
        most BUSY_MS.
        """
        self._may_read.wait(BUSY_MS / 1000)

    def _checkpoint(self, future: Future[bool]) -> None:
        self._may_read.clear()
        try:
            with closing(self._engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
                ((usual,),) = cursor.execute("PRAGMA busy_timeout").fetchall()
                cursor.execute(f"PRAGMA busy_timeout={BUSY_MS}")
                try:
                    ((busy, _, _),) = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                finally:
                    cursor.execute(f"PRAGMA busy_timeout={usual}")
        except Exception as error:  # noqa: BLE001 - the thread must go on after any error; the caller raises it
            self._fail([future], UnavailableError, self._unwritable(error), error)
        else:
            future.set_result(not busy)
        finally:
            self._may_read.set()

    def _wants_new_connection(self, error: Exception) -> bool:
        """SQLite opens the file for reading alone where the disk is read-only, and keeps that connection so."""
        return _name_of(error).startswith("SQLITE_READONLY")

    def _unwritable(self, error: Exception) -> str:
        return f"the catalog must be writable, got {_name_of(error)}; is the disk full?"


def _name_of(error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    return getattr(cause, "sqlite_errorname", None) or type(cause).__name__
