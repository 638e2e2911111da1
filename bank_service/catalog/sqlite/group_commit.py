"""One writer thread. Operations that wait together share one transaction, hence one fsync."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from bank_service.errors import BankError, InternalError, UnavailableError

T = TypeVar("T")
Write: TypeAlias = tuple[Callable[[Connection], Any], Future[Any]]  # an operation, and the future of its caller
MAX_BATCH = 256  # operations in one transaction
BUSY_MS = 500  # the longest that one checkpoint waits for readers; writes and new readers wait for it


class GroupCommit:
    """Runs write operations one after the other in a shared transaction.

    An operation's future gets its result only after the commit. An operation that fails changes nothing and does not
    affect the others. If the commit itself fails, each of its operations gets an UnavailableError.

    An operation may run twice. If one of a transaction fails, the transaction is rolled back. Then all operations run
    again, each in a savepoint.
    """

    def __init__(self, engine: Engine) -> None:
        """The caller must not use ``engine`` any more."""
        self._engine = engine
        self._may_read = threading.Event()  # no checkpoint is under way
        self._may_read.set()
        # A future without an operation asks for a checkpoint. None ends the thread.
        self._queue: queue.SimpleQueue[Write | Future[bool] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # no operation may come after the end mark
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bank-catalog-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Callable[[Connection], T]) -> Future[T]:
        """Queues an operation. The future gets its result when it is durable. UnavailableError after ``close``."""
        future: Future[T] = Future()
        self._put((operation, future), future)
        return future

    def checkpoint(self) -> Future[bool]:
        """Moves all commits into the database's file and empties the write-ahead log, which has older pages. False
        where a reader of an older state prevents it: try again."""
        future: Future[bool] = Future()
        self._put(future, future)
        return future

    def wait_to_read(self) -> None:
        """Waits for a checkpoint under way. Every reader calls it before it begins.

        Without it, overlapping readers would use the log all the time, and no checkpoint could empty it. It takes at
        most BUSY_MS.
        """
        self._may_read.wait(BUSY_MS / 1000)

    def close(self) -> None:
        """Commits the queued operations and ends the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()
        self._engine.dispose()

    def _put(self, item: Write | Future[bool], future: Future[Any]) -> None:
        future.set_running_or_notify_cancel()  # a commit under way can't be cancelled
        with self._lock:
            if self._closed:
                raise UnavailableError("the catalog is closed; the bank is stopping")
            self._queue.put(item)

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            while len(batch) < MAX_BATCH and batch[-1] is not None and not self._queue.empty():
                batch.append(self._queue.get())
            self._commit([item for item in batch if isinstance(item, tuple)])
            for item in batch:
                if isinstance(item, Future):
                    self._checkpoint(item)
            if batch[-1] is None:
                return

    def _commit(self, batch: list[Write]) -> None:
        futures = [future for _, future in batch]
        try:
            try:
                done = self._together(batch)
            except BankError:
                done = self._apart(batch)
        except SQLAlchemyError as error:
            self._engine.dispose()  # SQLite may have opened the file read-only; only a new connection writes
            _fail(futures, UnavailableError, _unwritable(error), error)
        except Exception as error:  # noqa: BLE001 - a bug in an operation; its waiters raise it
            message = f"an operation of the catalog failed: {type(error).__name__}: {error}"
            _fail(futures, InternalError, message, error)
        else:
            for future, result in done:
                future.set_result(result)

    def _together(self, batch: list[Write]) -> list[tuple[Future[Any], Any]]:
        """Runs all operations: (future, result) for each. The first BankError undoes them all."""
        with self._engine.begin() as connection:
            return [(future, operation(connection)) for operation, future in batch]

    def _apart(self, batch: list[Write]) -> list[tuple[Future[Any], Any]]:
        """Runs each operation in a savepoint. The future of one that fails gets its error; it is not in the result."""
        done: list[tuple[Future[Any], Any]] = []
        with self._engine.begin() as connection:
            for operation, future in batch:
                try:
                    with connection.begin_nested():
                        result = operation(connection)
                except BankError as error:
                    future.set_exception(error)
                else:
                    done.append((future, result))
        return done

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
            _fail([future], UnavailableError, _unwritable(error), error)
        else:
            future.set_result(not busy)
        finally:
            self._may_read.set()


def _fail(futures: Sequence[Future[Any]], kind: type[BankError], message: str, cause: Exception) -> None:
    for future in futures:
        if not future.done():
            # Each future needs its own error, because a stream writes the request's index into it.
            failure = kind(message)
            failure.__cause__ = cause
            future.set_exception(failure)


def _unwritable(error: Exception) -> str:
    # Only the name of SQLite's error. Its message may contain text of a document, and callers of other documents share
    # this commit.
    cause = getattr(error, "orig", None) or error
    name = getattr(cause, "sqlite_errorname", None) or type(cause).__name__
    return f"the catalog must be writable, got {name}; is the disk full?"
