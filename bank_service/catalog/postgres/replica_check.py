"""Checks whether a server is a streaming replica of the catalog's own."""

from __future__ import annotations

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import error_name, reader_of, shown
from bank_service.catalog.sql.prepared import run_text
from bank_service.values.engine_state import NO_START, EngineState, Lack

ENGINE = "PostgreSQL replica"
# The identifier is that of the cluster, which a copy of its files keeps and a restored dump doesn't.
_PLACE = "SELECT system_identifier, current_database(), current_schema() FROM pg_control_system()"
_IS_STANDBY = "SELECT pg_is_in_recovery(), current_setting('server_version')"
_REPLAYED = "SELECT pg_last_wal_replay_lsn()::text"
_BEHIND = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), %(replayed)s::pg_lsn)::bigint"


def place_of(connection: sa.Connection) -> tuple[str, ...]:
    """The cluster, the database and the schema of a connection."""
    return tuple("none" if part is None else str(part) for part in run_text(connection, _PLACE)[0])


def check_standby(connection: sa.Connection, url: str, place: tuple[str, ...]) -> None:
    """RuntimeError where a connection doesn't lead to a replica of ``place``."""
    found = place_of(connection)
    for what, wanted, got in zip(("the cluster", "the database", "the schema"), place, found, strict=True):
        if wanted != got:
            raise RuntimeError(
                f"catalog_read must be a replica of catalog, with {what} {wanted}, got {got} at {shown(url)}; name a "
                "streaming replica of the catalog's server, and the same database and search_path"
            )
    if not run_text(connection, _IS_STANDBY)[0][0]:
        raise RuntimeError(
            f"catalog_read must be a replica in recovery, got a server that takes writes at {shown(url)}; name a "
            "streaming replica (pg_basebackup -R makes one), or leave --catalog-read out"
        )


def check_replica(catalog: str, url: str) -> None:
    """RuntimeError where the URL leads to no replica of the catalog. One that can't be reached passes, because it may
    come later."""
    primary, replica = reader_of(catalog), reader_of(url)
    try:
        with primary.connect() as own, replica.connect() as connection:
            check_standby(connection, url, place_of(own))
    except sa.exc.SQLAlchemyError:
        pass
    finally:
        primary.dispose()
        replica.dispose()


def replica_state(url: str, catalog: str) -> EngineState:
    """The state of a replica, for ``regrad bank --check``."""
    primary, replica = reader_of(catalog), reader_of(url)
    version = ""
    try:
        with replica.connect() as connection:
            _, version = run_text(connection, _IS_STANDBY)[0]
            with primary.connect() as own:
                check_standby(connection, url, place_of(own))
                ((replayed,),) = run_text(connection, _REPLAYED)
                ((behind,),) = run_text(own, _BEHIND, {"replayed": replayed})
        return EngineState(ENGINE, True, f"{version}, {max(0, behind)} bytes of log behind")
    except RuntimeError as error:
        return EngineState(ENGINE, bool(version), version, (Lack("a replica of --catalog", NO_START, str(error)),))
    except sa.exc.SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        reason = (str(cause).strip() or error_name(error)).splitlines()[0]
        remedy = f"start it, or mend --catalog-read or the password file; {shown(url)} gave: {reason}"
        return EngineState(ENGINE, bool(version), version, (Lack("an answer", "all reads go to --catalog", remedy),))
    finally:
        primary.dispose()
        replica.dispose()
