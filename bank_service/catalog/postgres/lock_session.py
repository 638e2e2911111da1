"""A node's connection that only holds advisory locks: of the gradients that it writes, and of the upkeep.

The connection has a random lock of its own, its ``name``. While the server has that, it has all the others, too. So a
transaction of another connection can see whether a hold was lost.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import error_name, name_for_log
from bank_service.catalog.postgres.membership import LEADER
from bank_service.errors import UnavailableError
from bank_service.runtime.seldom import Seldom

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.02  # in which locks that nobody needs any more are given back together
BEAT_SECONDS = 1.0  # between two looks at the connection; another node takes the upkeep over so much later
_LEAD = f"SELECT pg_try_advisory_lock({LEADER})"


@dataclass(slots=True)
class _Hold:
    num_users: int = 0
    session: int = 0  # the name of the connection that has the lock; 0: none yet


class LockSession:
    """Safe to use from many threads. A lost connection is made anew, and its holds stay lost."""

    def __init__(self, engine: sa.Engine, beat: Callable[[], bool]) -> None:
        """``engine``: with one connection. ``beat`` is called every second and must not wait. While it returns False,
        this node has no locks. It may raise UnavailableError. SQLAlchemyError where the server can't be reached."""
        self._beat = beat
        self._engine = engine
        self._errors = engine.dialect.loaded_dbapi.Error
        self._connection: Any = None  # SQLAlchemy's, of the pool
        self._name = 0
        self._leads = False
        self._wire = threading.Lock()  # of the connection
        self._memory = threading.Lock()  # of the holds; never kept while the server works
        self._holds: dict[int, _Hold] = {}  # by key
        self._unlocks: Counter[tuple[int, int]] = Counter()  # (session, key)
        self._failures = Seldom()
        self._is_closed = False
        self._work = threading.Event()  # there are unlocks, or the end
        try:
            with self._wire:
                self._connect()
                self._leads = self._ask(_LEAD)
        except BaseException:
            engine.dispose()
            raise
        self._thread = threading.Thread(target=self._run, name="bank-node", daemon=True)
        self._thread.start()

    @property
    def leads(self) -> bool:
        """This node has the lock of the upkeep."""
        return self._leads

    def close(self) -> None:
        self._is_closed = True
        self._work.set()
        self._thread.join(BEAT_SECONDS)  # a server that hangs must not hold up the stop
        self._give_up()
        self._engine.dispose()

    @contextmanager
    def held(self, key: int) -> Iterator[None]:
        """The lock of ``keep`` stays until the end of the block."""
        with self._memory:
            self._holds.setdefault(key, _Hold()).num_users += 1
        try:
            yield
        finally:
            with self._memory:
                hold = self._holds[key]
                hold.num_users -= 1
                if not hold.num_users:
                    del self._holds[key]
                    if hold.session:
                        self._unlocks[hold.session, key] += 1
                        self._work.set()

    def keep(self, key: int) -> None:
        """Takes the shared lock of a key inside ``held``. It waits while another node has the key for itself.

        UnavailableError.
        """
        try:
            self._keep(key)
        except UnavailableError:
            if self.session_of(key):
                raise
            self._keep(key)  # the connection had broken before

    def _keep(self, key: int) -> None:
        with self._wire, self._told():
            self._ready()
            hold = self._holds[key]
            if hold.session == self._name:
                return
            if hold.session:
                raise UnavailableError("a gradient must stay while it is written, its hold was lost; try again")
            self._ask(f"SELECT pg_advisory_lock_shared({key})")
            with self._memory:
                hold.session = self._name

    def session_of(self, key: int) -> int:
        """The name of the session in which the key was kept; 0 where it is not."""
        with self._memory:
            hold = self._holds.get(key)
            return 0 if hold is None else hold.session

    def ask(self, statement: str) -> bool:
        """The only value of a statement's answer. UnavailableError."""
        with self._wire, self._told():
            self._ready()
            return self._ask(statement)

    def _run(self) -> None:
        while True:
            if self._work.wait(BEAT_SECONDS):
                time.sleep(GATHER_SECONDS)
                self._work.clear()
            if self._is_closed:
                return
            try:
                goes_on = self._beat()
                with self._wire, self._told():
                    if not goes_on:
                        self._give_up()
                        continue
                    self._ready()
                    self._leads = self._ask("SELECT true" if self._leads else _LEAD)
            except UnavailableError:
                pass

    def _ready(self) -> None:
        """A connection without the locks that nobody needs any more."""
        if self._connection is None:
            self._connect()
        with self._memory:
            unlocks, self._unlocks = self._unlocks, Counter()
        for (session, key), number in unlocks.items():
            for _ in range(number if session == self._name else 0):
                self._ask(f"SELECT pg_advisory_unlock_shared({key})")

    def _connect(self) -> None:
        connection = self._engine.raw_connection()
        self._name = secrets.randbits(62) | 1
        self._connection = connection
        self._ask(f"SELECT pg_try_advisory_lock({self._name})")

    def _give_up(self) -> None:
        self._leads = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()

    def _ask(self, statement: str) -> bool:
        """The only value of a statement's answer."""
        return bool(self._connection.driver_connection.execute(statement).fetchone()[0])

    @contextmanager
    def _told(self) -> Iterator[None]:
        """After an error the connection is given up, because nobody knows which locks it has."""
        try:
            yield
        except (self._errors, sa.exc.SQLAlchemyError) as error:
            self._give_up()
            if self._failures.is_due():
                logger.warning("the locks of this node are lost: %s; taking them again", name_for_log(error))
            raise UnavailableError(
                f"the catalog in PostgreSQL must give locks, got {error_name(error)}; try again"
            ) from error
