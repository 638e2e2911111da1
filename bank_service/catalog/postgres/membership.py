"""The nodes of a catalog in PostgreSQL: the banks that have it together. Advisory locks tell who they are.

The server frees a connection's locks when the connection ends, even if its node was killed. Each node has these locks
on the connection of its writer:

- NODES: shared, where the gradients lie in an object store. A bank with its gradients in a folder takes it for itself
  alone, so it has no other node beside it.
- its own random number. A new connection waits for it, so the one before is over by then.

WRITES is a lock of each transaction that writes. So writes of all nodes come one after the other, and each sees all
those before it.

Nodes know the collection's codec, learner and other settings from their start. So only a node that is alone changes
them. A node whose connection was broken meanwhile compares them on its next one, and stops where they are others.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.sql.prepared import run_text
from bank_service.errors import BankInUseError, UnavailableError

TAKE_SECONDS = 3.0  # time for the server to notice that the connection of a killed bank is gone
PAUSE_SECONDS = 0.1
ALONE_TRIES = 3
IDLE_SECONDS = 15  # a node that hangs keeps its locks for so long, and in a transaction holds up all other writes
# A catalog is a schema of a database, and the locks are of the database.
NODES = "hashtext('regrad bank'), hashtext(current_schema())"
WRITES = "hashtext('regrad writes'), hashtext(current_schema())"
LEADER = "hashtext('regrad upkeep'), hashtext(current_schema())"
BEGIN_WRITE = f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock({WRITES})"
_ALONE = f"SELECT pg_try_advisory_xact_lock({NODES})"
_LEAVE = f"SELECT pg_advisory_unlock_shared({NODES})"
_BEGIN_EPOCH = "INSERT INTO epoch (id, objects) VALUES (1, '') ON CONFLICT DO NOTHING"
_ADD_NODE = "INSERT INTO nodes (node, token, is_over, seen) VALUES (%(node)s, '', false, now())"
_SETTINGS = (
    "SELECT schema_version, learner_fingerprint, layout_id, codec, (SELECT seconds FROM history_setting), "
    "(SELECT version FROM words_version), (SELECT learner_fingerprint FROM next_learner) FROM collection"
)
_FORGET_OBJECTS = "UPDATE epoch SET objects = '-' WHERE objects <> ''"


class Membership:
    """One bank's membership, from its start to its end."""

    def __init__(self, *, is_shared: bool) -> None:
        """``is_shared``: other nodes may have the catalog, too."""
        self.node = secrets.randbits(62)
        self.is_shared = is_shared
        self.is_stale = False  # another node has changed the settings
        self._has_joined = False
        # Those that this node knows: one, or a second one while a change may not be committed.
        self._settings: set[tuple[Any, ...]] = set()

    def enter(self, connection: Any, _record: object = None) -> None:
        """Takes the locks for a new connection of the driver's. BankInUseError where another bank doesn't allow it.

        RuntimeError where no schema of the search path is there.
        """
        kind = "_shared" if self.is_shared else ""
        _take(connection, f"SELECT pg_try_advisory_lock{kind}({NODES})")
        _take(connection, f"SELECT pg_try_advisory_lock({self.node})")
        if self.is_shared:
            connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_SECONDS * 1000}")
        if self.is_shared and not self._has_joined:
            connection.execute(_LEAVE)  # ``join`` takes it in its transaction

    def join(self, connection: sa.Connection) -> bool:
        """Becomes a node, in the transaction that opens the catalog. Returns whether it is the only one."""
        is_alone = self._is_alone(connection)
        if self.is_shared and not self._has_joined:
            _take(connection.connection.driver_connection, f"SELECT pg_try_advisory_lock_shared({NODES})")
            self._has_joined = True
        return is_alone

    def begin(self, connection: sa.Connection, *, is_alone: bool) -> None:
        """Ends the transaction that opens the catalog. The tables must exist."""
        run_text(connection, _BEGIN_EPOCH)
        run_text(connection, _ADD_NODE, {"node": self.node})
        if is_alone:
            # The nodes get a new name in the object store. So a copy of this database isn't taken for it.
            run_text(connection, _FORGET_OBJECTS)
        self._settings = {run_text(connection, _SETTINGS)[0]}
        connection.info["is_known"] = True

    def check(self, connection: sa.Connection) -> None:
        """Call it at the begin of each transaction that writes. BankInUseError where the settings have changed while
        this node was without a connection."""
        if not connection.info.get("is_known"):
            found = run_text(connection, _SETTINGS)[0]
            self.is_stale = found not in self._settings
            if self.is_stale:
                raise BankInUseError(STALE)
            self._settings = {found}
            connection.info["is_known"] = True

    @contextmanager
    def changing(self, connection: sa.Connection) -> Iterator[None]:
        """Change settings inside the block. UnavailableError unless this is the only node."""
        if not self._is_alone(connection):
            raise UnavailableError(
                "a collection's codec or learner can only be changed by a node that is alone, got others with the same "
                "catalog; stop the others, change it, and start them again when that is done"
            )
        yield
        self._settings.add(run_text(connection, _SETTINGS)[0])
        connection.info.pop("is_known", None)  # the next transaction tells which of them came through

    @staticmethod
    def _is_alone(connection: sa.Connection) -> bool:
        """Whether no other node has the catalog. Then none gets it before the end of the transaction."""
        for _ in range(ALONE_TRIES):  # the server may not have noticed yet that one has just ended
            ((is_alone,),) = run_text(connection, _ALONE)
            if is_alone:
                return True
            time.sleep(PAUSE_SECONDS)
        return False


STALE = (
    "another node has changed the collection's codec, learner, history or schema while this one had no connection "
    "to the catalog; start this node again"
)


def _take(connection: Any, statement: str) -> None:
    deadline = time.monotonic() + TAKE_SECONDS
    while not (is_taken := connection.execute(statement).fetchone()[0]):
        if is_taken is None:
            connection.close()
            raise RuntimeError("a schema of search_path must be in the database, got none; CREATE SCHEMA makes one")
        if time.monotonic() > deadline:
            connection.close()
            raise _in_use()
        time.sleep(PAUSE_SECONDS)


def _in_use() -> BankInUseError:
    return BankInUseError(
        "another bank has this catalog in PostgreSQL; stop that bank, or name another database. Several "
        "banks can have one catalog only where the gradients of all lie in one object store (--objects)"
    )
