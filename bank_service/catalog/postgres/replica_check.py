"""Checks whether a server is a streaming replica of the catalog's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import reader_of, reason_of, shown
from bank_service.catalog.postgres.server_check import ANSWER, fault_of
from bank_service.catalog.sql.prepared import run_text
from bank_service.values.engine_state import NO_START, EngineState, Lack

ENGINE = "PostgreSQL replica"
# The identifier is that of the cluster, which a copy of its files keeps and a restored dump doesn't.
_PLACE = "SELECT system_identifier, current_database(), current_schema() FROM pg_control_system()"
_LACKS_SCHEMA = "SELECT to_regnamespace(quote_ident(%(schema)s)) IS NULL"
_IS_STANDBY = "SELECT pg_is_in_recovery(), current_setting('server_version')"
_REPLAYED = "SELECT pg_last_wal_replay_lsn()::text"
_ALL_AT_PRIMARY = "all reads go to --catalog"
_BEHIND = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), %(replayed)s::pg_lsn)::bigint"


class NotReplicatingError(RuntimeError):
    """A server of the catalog's cluster that is no replica now: it takes writes, or lags behind the schema."""


def place_of(connection: sa.Connection) -> tuple[str, ...]:
    """The cluster, the database and the schema of a connection."""
    return tuple("none" if part is None else str(part) for part in run_text(connection, _PLACE)[0])


def check_standby(connection: sa.Connection, url: str, place: tuple[str, ...]) -> None:
    """RuntimeError where a connection leads to another place than ``place``. NotReplicatingError where it leads to no
    replica now. After a failover it may be the primary."""
    found = place_of(connection)
    for what, wanted, got in zip(("the cluster", "the database", "the schema"), place, found, strict=True):
        if wanted != got:
            if what == "the schema" and run_text(connection, _LACKS_SCHEMA, {"schema": wanted})[0][0]:
                raise NotReplicatingError(
                    f"catalog_read must have the schema {wanted}, {shown(url)} lacks it; it comes when the replica has "
                    "replayed the primary's log"
                )
            raise RuntimeError(
                f"catalog_read must be a replica of catalog, with {what} {wanted}, got {got} at {shown(url)}; name a "
                "streaming replica of the catalog's server, and the same database and search_path"
            )
    if not run_text(connection, _IS_STANDBY)[0][0]:
        raise NotReplicatingError(
            f"catalog_read must be a replica in recovery, got a server that takes writes at {shown(url)}; name a "
            "streaming replica (pg_basebackup -R makes one), or leave --catalog-read out"
        )


def check_replica(catalog: str, url: str) -> None:
    """RuntimeError where the URL leads to another catalog's server. One that can't be reached or doesn't replicate
    passes, because it may do so later."""
    with (
        _engines(catalog, url) as (primary, replica),
        suppress(sa.exc.SQLAlchemyError, NotReplicatingError),
        primary.connect() as own,
        replica.connect() as connection,
    ):
        check_standby(connection, url, place_of(own))


def replica_state(url: str, catalog: str) -> EngineState:
    """The state of a replica, for ``regrad bank --check``."""
    version = ""
    with _engines(catalog, url) as (primary, replica):
        try:
            with replica.connect() as connection:
                _, version = run_text(connection, _IS_STANDBY)[0]
                ((replayed,),) = run_text(connection, _REPLAYED)
                try:
                    with primary.connect() as own:
                        place = place_of(own)
                        ((behind,),) = run_text(own, _BEHIND, {"replayed": replayed})
                except sa.exc.SQLAlchemyError:
                    lack = Lack("a primary to compare it with", NO_START, "make --catalog answer first")
                    return EngineState(ENGINE, True, version, (lack,))
                check_standby(connection, url, place)
            return EngineState(ENGINE, True, f"{version}, {max(0, behind)} bytes of log behind")
        except RuntimeError as error:
            cost = _ALL_AT_PRIMARY if isinstance(error, NotReplicatingError) else NO_START
            return EngineState(ENGINE, True, version, (Lack("a replica of --catalog", cost, str(error)),))
        except sa.exc.SQLAlchemyError as error:
            reason = reason_of(error)
            missing, _ = fault_of(reason)
            remedy = f"{'start it, or ' * (missing == ANSWER)}mend --catalog-read or the password file"
            lack = Lack(missing, _ALL_AT_PRIMARY, f"{remedy}; {shown(url)} gave: {reason}")
            return EngineState(ENGINE, bool(version) or missing != ANSWER, version, (lack,))


@contextmanager
def _engines(*urls: str) -> Iterator[list[sa.Engine]]:
    engines = [reader_of(url) for url in urls]
    try:
        yield engines
    finally:
        for engine in engines:
            engine.dispose()
