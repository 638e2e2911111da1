"""One writer thread. Operations that wait together share one transaction, hence one fsync."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from bank_service.errors import BankError, BankInUseError, InternalError, UnavailableError

T = TypeVar("T")
Write: TypeAlias = tuple[Callable[[Connection], Any], Future[Any]]  # an operation, and the future of its caller
MAX_BATCH = 256  # operations in one transaction


class GroupCommit(ABC):
    """Runs write operations one after the other in a shared transaction.

    An operation's future gets its result only after the commit. An operation that fails changes nothing and does not
    affect the others. If the commit itself fails, each of its operations gets an UnavailableError.

    An operation may run twice. If one of a transaction fails, the transaction is rolled back. Then all operations run
    again, each in a savepoint.
    """

    def __init__(self, engine: Engine) -> None:
        """The caller must not use ``engine`` any more."""
        self._engine = engine
        # A function is called between two transactions. None ends the thread.
        self._queue: queue.SimpleQueue[Write | Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # no operation may come after the end mark
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bank-catalog-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Callable[[Connection], T]) -> Future[T]:
        """Queues an operation. The future gets its result when it is durable. UnavailableError after ``close``."""
        future: Future[T] = Future()
        self._put((operation, future), future)
        return future

    def close(self) -> None:
        """Commits the queued operations and ends the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()
        self._engine.dispose()

    def _put(self, item: Write | Callable[[], None], future: Future[Any]) -> None:
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
            if writes := [item for item in batch if isinstance(item, tuple)]:
                self._commit(writes)
            for item in batch:
                if callable(item):
                    item()
            if batch[-1] is None:
                return

    def _commit(self, batch: list[Write], *, is_repeat: bool = False) -> None:
        futures = [future for _, future in batch]
        try:
            try:
                done = self._together(batch)
            except BankError:
                done = self._apart(batch)
        except (SQLAlchemyError, BankInUseError) as error:
            self._engine.dispose()
            if not is_repeat and self._wants_new_connection(error):
                # Operations that failed on their own have told it already.
                self._commit([(operation, future) for operation, future in batch if not future.done()], is_repeat=True)
                return
            self._fail(futures, UnavailableError, self._unwritable(error), error)
        except Exception as error:  # noqa: BLE001 - a bug in an operation; its waiters raise it
            message = f"an operation of the catalog failed: {type(error).__name__}: {error}"
            self._fail(futures, InternalError, message, error)
        else:
            for future, result in done:
                future.set_result(result)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """The transaction of a batch. It is durable when the block has ended."""
        with self._engine.begin() as connection:
            yield connection

    def _together(self, batch: list[Write]) -> list[tuple[Future[Any], Any]]:
        """Runs all operations: (future, result) for each. The first BankError undoes them all."""
        with self._transaction() as connection:
            return [(future, operation(connection)) for operation, future in batch]

    def _apart(self, batch: list[Write]) -> list[tuple[Future[Any], Any]]:
        """Runs each operation in a savepoint. The future of one that fails gets its error; it is not in the result."""
        done: list[tuple[Future[Any], Any]] = []
        with self._transaction() as connection:
            for operation, future in batch:
                try:
                    with connection.begin_nested():
                        result = operation(connection)
                except BankError as error:
                    future.set_exception(error)
                else:
                    done.append((future, result))
        return done

    def _wants_new_connection(self, error: Exception) -> bool:
        """Whether nothing was done because of the connection alone, so that another one may succeed."""
        return False

    @abstractmethod
    def _unwritable(self, error: Exception) -> str:
        """A message for callers. It must not have the text of a document, as a database's message may: callers of
        other documents share the commit."""

    @staticmethod
    def _fail(futures: Sequence[Future[Any]], kind: type[BankError], message: str, cause: Exception) -> None:
        for future in futures:
            if not future.done():
                # Each future needs its own error, because a stream writes the request's index into it.
                failure = kind(message)
                failure.__cause__ = cause
                future.set_exception(failure)
