"""The nodes of a catalog in PostgreSQL, whose gradients lie in an object store; see ``catalog.nodes``.

Why no gradient is removed that a version names, in three rules:

1. A node that writes a record has a shared lock of its digest, on its ``LockSession``, from before the write. It finds
   no row of the digest in ``removals`` after it has the lock.
2. A removal is decided in a transaction that writes. It finds no version with the digest, gets the digest's lock for
   itself, and adds a row to ``removals``.
3. The transaction that names the digest finds the lock of rule 1 still there, or a version that names the digest
   already. Such transactions come one after the other, so no removal is decided between this look and the commit.

The row stays while the store may still carry the removal out. So this holds for nodes that are killed at any moment,
and for lost connections. It holds for commits without an answer, because they have their turn until they are over.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from bank_service.catalog.nodes import OVER_SECONDS, Decision
from bank_service.catalog.postgres.lock_session import LockSession
from bank_service.catalog.postgres.membership import Membership
from bank_service.catalog.postgres.postgres_writer import PostgresWriter
from bank_service.catalog.sql import gradients
from bank_service.catalog.sql.prepared import run_text
from bank_service.errors import UnavailableError
from bank_service.runtime.holds import still_going

T = TypeVar("T")

WAIT_SECONDS = 5.0  # the longest that a write waits for a removal of the same gradient
PAUSE_SECONDS = 0.05
MAX_DROPPED = 5_000  # in one transaction, because all nodes wait for it
_NAME = "SELECT ltrim(objects, '-'), objects = '' FROM epoch"
_WAITS = "SET LOCAL idle_in_transaction_session_timeout = '60s'"  # for the object store
_SET_NAME = "UPDATE epoch SET objects = %(name)s"
_IS_OVER = "NOT is_over AND node <> %(own)s AND pg_try_advisory_xact_lock(node)"
_ENDED_NODES = f"SELECT node FROM nodes WHERE {_IS_OVER}"
_REMEMBER = f"UPDATE nodes SET is_over = true WHERE node = ANY(%(ended)s) AND {_IS_OVER}"
_FORGET = "DELETE FROM nodes WHERE is_over AND seen < now() - interval '7 days'"
_LOCK = "SELECT key FROM unnest(%(keys)s::bigint[]) AS key WHERE pg_try_advisory_xact_lock(key)"
_BEGIN = (
    "INSERT INTO removals (digest, until) SELECT unnest(%(digests)s::text[]), statement_timestamp() + %(wait)s * "
    "interval '1 second' ON CONFLICT (digest) DO UPDATE SET until = excluded.until "
    "WHERE removals.until < statement_timestamp() RETURNING digest, until"
)
# A row with another ``until`` is of a later decision, which may be another node's.
_ENDED = "DELETE FROM removals WHERE digest = ANY(%(digests)s) AND until = %(until)s OR until < statement_timestamp()"
_DROP = "INSERT INTO dropped_gradients (digest, since) SELECT unnest(%(digests)s::text[]), now() ON CONFLICT (digest) "
_DROP_ANEW = _DROP + "DO UPDATE SET since = excluded.since"
_DROP_NEW = _DROP + "DO NOTHING"
_DROPPED = "SELECT digest, since FROM dropped_gradients WHERE since <= now() - %(seconds)s * interval '1 second'"
# Only an equal ``since`` is the same wait. An earlier one may be a later wait, of a transaction that waited for WRITES.
_FORGET_DROPPED = (
    "DELETE FROM dropped_gradients WHERE (digest, since) IN "
    "(SELECT * FROM unnest(%(digests)s::text[], %(since)s::timestamptz[]))"
)


class PostgresNodes:
    """Implements ``Nodes``."""

    def __init__(
        self,
        writer: PostgresWriter,
        membership: Membership,
        locks: sa.Engine,
        collection_id: str,
    ) -> None:
        """``locks``: an engine with one connection. SQLAlchemyError."""
        self._writer = writer
        self._membership = membership
        self._collection_id = collection_id
        self._session = LockSession(locks, self._beat)

    def close(self) -> None:
        self._session.close()

    @property
    def leads(self) -> bool:
        return self._session.leads

    @property
    def is_current(self) -> bool:
        return not self._membership.is_stale

    def take_objects(self, take: Callable[[str, bool], None]) -> None:
        failures: list[Exception] = []

        def operation(connection: sa.Connection) -> None:
            failures.clear()
            ((known, is_first),) = run_text(connection, _NAME)
            if known:
                return
            name = secrets.token_hex(16)
            run_text(connection, _WAITS)
            try:
                take(name, is_first)
            except Exception as error:  # noqa: BLE001 - the caller gets it, and the transaction changes nothing
                failures.append(error)
                return
            run_text(connection, _SET_NAME, {"name": name})

        self._write(operation)
        if failures:
            raise failures[0]

    def objects_name(self) -> str:
        # In a transaction that writes: while another node takes the store, this one waits for the name.
        return str(self._write(lambda connection: run_text(connection, _NAME)[0][0]))

    def ended(self) -> list[int]:
        own = {"own": self._membership.node}
        return self._write(lambda connection: [int(node) for (node,) in run_text(connection, _ENDED_NODES, own)])

    def remember_ended(self, numbers: Collection[int]) -> None:
        def operation(connection: sa.Connection) -> None:
            run_text(connection, _FORGET)
            run_text(connection, _REMEMBER, {"own": self._membership.node, "ended": list(numbers)})

        if numbers:
            self._write(operation)

    # Gradients that go into the object store

    def held(self, digest: str) -> AbstractContextManager[None]:
        return self._session.held(self._key(digest))

    def keep(self, digest: str) -> None:
        self._session.keep(self._key(digest))
        assert digest.isalnum()
        deadline = time.monotonic() + WAIT_SECONDS
        statement = f"SELECT EXISTS (SELECT 1 FROM removals WHERE digest = '{digest}' AND until > clock_timestamp())"
        while self._session.ask(statement):
            if time.monotonic() > deadline:
                raise still_going(digest, OVER_SECONDS)
            time.sleep(PAUSE_SECONDS)

    def check(self, connection: sa.Connection, digest: str) -> None:
        """Rule 3 above: UnavailableError where the gradient may be removed before the end of this transaction."""
        session = self._session.session_of(self._key(digest))
        if session:
            ((is_over,),) = run_text(connection, f"SELECT pg_try_advisory_xact_lock_shared({session})")
            if not is_over:
                return
        if not gradients.sizes(connection, [digest]):
            raise UnavailableError(
                f"gradient {digest} must stay while its document is written, its hold was lost or another node has "
                "changed the document; try again"
            )

    # Gradients that leave it

    def begin_removal(self, digests: Sequence[str]) -> Decision:
        keys = {self._key(digest): digest for digest in digests}

        def operation(connection: sa.Connection) -> Decision:
            named = gradients.sizes(connection, digests)
            unnamed = {digest for digest in digests if digest not in named}
            free = run_text(connection, _LOCK, {"keys": [self._key(digest) for digest in unnamed]})
            decided = {"digests": [keys[key] for (key,) in free], "wait": OVER_SECONDS}
            going = dict(run_text(connection, _BEGIN, decided))
            return Decision(going.keys(), unnamed - going.keys(), max(going.values(), default=None))

        return self._write(operation)

    def end_removal(self, decision: Decision, digests: Collection[str]) -> None:
        # Nobody waits for it. If it fails, the rows are over after a while.
        values = {"digests": list(digests), "until": decision.until}
        self._writer.submit(lambda connection: run_text(connection, _ENDED, values))

    def drop(self, digests: Collection[str]) -> None:
        chosen = sorted(digests)
        for start in range(0, len(chosen), MAX_DROPPED):
            self._run(_DROP_NEW, {"digests": chosen[start : start + MAX_DROPPED]})

    def note_dropped(self, connection: sa.Connection, digests: Collection[str]) -> None:
        """The transaction takes these from a version. They wait anew."""
        if digests:
            run_text(connection, _DROP_ANEW, {"digests": sorted(digests)})

    def dropped(self, seconds: float) -> dict[str, datetime]:
        return self._write(lambda connection: dict(run_text(connection, _DROPPED, {"seconds": seconds})))

    def forget_dropped(self, waits: Mapping[str, datetime]) -> None:
        if waits:
            self._run(_FORGET_DROPPED, {"digests": list(waits), "since": list(waits.values())})

    def _beat(self) -> bool:
        """A writer without a connection is no node, and others may change the settings. So it looks often. A node that
        has missed a change, or whose writer fails, does no upkeep.

        A node whose claim to the object store is lost goes on. The other nodes have lost the same claim, and the rest
        of the upkeep must be done."""
        self._writer.settle()
        return self.is_current and not self._writer.is_failing

    def _run(self, statement: str, values: dict[str, list[Any]]) -> None:
        self._write(lambda connection: run_text(connection, statement, values))

    def _write(self, operation: Callable[[sa.Connection], T]) -> T:
        future: Future[T] = self._writer.submit(operation)
        return future.result()

    def _key(self, digest: str) -> int:
        """The number of a gradient's lock. Two gradients with one number would only wait for each other."""
        hashed = hashlib.blake2b(f"{self._collection_id} {digest}".encode(), digest_size=8).digest()
        return int.from_bytes(hashed, "big", signed=True)
