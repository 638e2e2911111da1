"""One writer thread: operations that wait together share one transaction, hence one fsync."""

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
BUSY_MS = 500  # the longest wait of writes for readers, and of new readers for writes, in one checkpoint


class GroupCommit:
    """Runs write operations one after the other in a shared transaction.

    An operation's future is resolved after the commit, never before. A failing operation leaves no trace and
    does not touch its neighbours. Where the commit itself fails, each of its operations gets an UnavailableError.
    An operation may run twice: where one of a transaction fails, the transaction is rolled back, and all run anew with
    a savepoint around each.
    """

    def __init__(self, engine: Engine) -> None:
        """``engine`` is its own from now on."""
        self._engine = engine
        self._may_read = threading.Event()  # no checkpoint is under way
        self._may_read.set()
        self._queue: queue.SimpleQueue[Write | Future[bool] | None] = queue.SimpleQueue()  # a future alone: checkpoint
        self._lock = threading.Lock()  # no operation may follow the end mark
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bank-catalog-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Callable[[Connection], T]) -> Future[T]:
        """The future's result is ``operation``'s, once it is durable. UnavailableError after ``close``."""
        future: Future[T] = Future()
        self._put((operation, future), future)
        return future

    def checkpoint(self) -> Future[bool]:
        """Moves what is committed into the database's file and empties the write-ahead log, which still has what the
        pages were before. False where a reader at an older state is in the way: try again."""
        future: Future[bool] = Future()
        self._put(future, future)
        return future

    def wait_to_read(self) -> None:
        """Readers call it before they begin, or a checkpoint would never find the log unread where they overlap.

        It takes no longer than a checkpoint waits for the readers that are there.
        """
        self._may_read.wait(BUSY_MS / 1000)

    def close(self) -> None:
        """Commits what is queued and ends the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()
        self._engine.dispose()

    def _put(self, item: Write | Future[bool], future: Future[Any]) -> None:
        future.set_running_or_notify_cancel()  # a commit under way can't be called back
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
            self._engine.dispose()  # SQLite opens a file for reading where it must, and then it stays at that
            _fail(futures, UnavailableError, _unwritable(error), error)
        except Exception as error:  # noqa: BLE001 - a bug in an operation; its waiters raise it
            message = f"an operation of the catalog failed: {type(error).__name__}: {error}"
            _fail(futures, InternalError, message, error)
        else:
            for future, result in done:
                future.set_result(result)

    def _together(self, batch: list[Write]) -> list[tuple[Future[Any], Any]]:
        """Each future with its operation's result. The first BankError of an operation, and no trace of any."""
        with self._engine.begin() as connection:
            return [(future, operation(connection)) for operation, future in batch]

    def _apart(self, batch: list[Write]) -> list[tuple[Future[Any], Any]]:
        """The same, but an operation that fails is told so, and left out."""
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
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread goes on, and the caller raises it
            _fail([future], UnavailableError, _unwritable(error), error)
        else:
            future.set_result(not busy)
        finally:
            self._may_read.set()


def _fail(futures: Sequence[Future[Any]], kind: type[BankError], message: str, cause: Exception) -> None:
    for future in futures:
        if not future.done():
            # One each: a stream marks its error with the place that its own request had.
            failure = kind(message)
            failure.__cause__ = cause
            future.set_exception(failure)


def _unwritable(error: Exception) -> str:
    # By SQLite's name for it alone: its own words may have some of a document, and others waited for the same commit.
    cause = getattr(error, "orig", None) or error
    name = getattr(cause, "sqlite_errorname", None) or type(cause).__name__
    return f"the catalog must be writable, got {name}; is the disk full?"
