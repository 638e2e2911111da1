"""Says what a database lacks for a catalog. All that it tries is rolled back."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import error_name, locks_of, reason_of, shown
from bank_service.catalog.postgres.server_check import (
    ANSWER,
    LEAST_SERVER,
    LEAST_VECTOR,
    check_free,
    fault_of,
    numbers_of,
)
from bank_service.errors import BankInUseError
from bank_service.values.engine_state import NO_START, EngineState, Lack

SERVER, EXTENSION = "PostgreSQL", "pgvector"
NUM_CONNECTIONS = 40  # that a bank needs under load

_SERVER = """
SELECT current_setting('server_version'), current_setting('server_version_num')::int / 10000,
    current_setting('server_encoding'), pg_is_in_recovery(), current_setting('fsync')::bool, current_schema(), user,
    least(
        current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,
        (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = user),
        (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())
    )
"""
# A table of the catalog that another role owns. Only the owner adds partitions and indexes.
_OF_OTHERS = """
SELECT relname FROM pg_class
WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p') AND NOT pg_has_role(relowner, 'USAGE')
    AND EXISTS (SELECT 1 FROM pg_tables WHERE schemaname = current_schema() AND tablename = 'collection')
ORDER BY relname LIMIT 1
"""
_EXTENSION = """
SELECT installed_version, default_version, to_regtype('halfvec') IS NOT NULL,
    (SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = name)
FROM pg_available_extensions WHERE name = 'vector'
"""


def database_states(url: str, *, is_shared: bool) -> tuple[EngineState, EngineState]:
    """The states of the server and of its extension. ``is_shared``: other banks may have the catalog."""
    try:
        engine = locks_of(url)
    except RuntimeError:
        lack = Lack("the package psycopg", NO_START, "pip install '.[postgres]'")
        return EngineState(SERVER, None, lacks=(lack,)), EngineState(EXTENSION, None)
    try:
        with engine.connect() as connection, connection.begin() as transaction:
            version, *facts = connection.exec_driver_sql(_SERVER).one()
            lacks = list(_server_lacks(connection, *facts))
            extension = _extension_state(connection)
            transaction.rollback()
        if not any(lack.stops for lack in (*lacks, *extension.lacks)):
            try:
                check_free(url, is_shared=is_shared)
            except BankInUseError as error:
                lacks.append(Lack("a catalog for itself", NO_START, str(error)))
        return EngineState(SERVER, True, version, tuple(lacks)), extension
    except sa.exc.SQLAlchemyError as error:
        reason = reason_of(error)
        missing, remedy = fault_of(reason)
        lack = Lack(missing, NO_START, f"{remedy}; {shown(url)} gave: {reason}")
        return EngineState(SERVER, missing != ANSWER, lacks=(lack,)), EngineState(EXTENSION, None)
    finally:
        engine.dispose()


def _server_lacks(
    connection: sa.Connection, version: int, encoding: str, is_standby: bool, is_lasting: bool, schema: str | None,
    user: str, num_connections: int,
) -> Iterator[Lack]:  # fmt: skip
    if version < LEAST_SERVER:
        yield Lack(f"version {LEAST_SERVER}", NO_START, "upgrade the server")
    if encoding != "UTF8":
        yield Lack(
            f"encoding UTF8, it has {encoding}", NO_START, "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )
    if is_standby:
        yield Lack("a server that takes writes, this is a standby", NO_START, "name the primary with --catalog")
    elif schema is None:
        yield Lack("a schema of search_path", NO_START, "CREATE SCHEMA, or mend search_path in --catalog")
    elif _refusal(connection, "CREATE TABLE regrad_check (number integer)") is not None:
        yield Lack("CREATE TABLE", NO_START, f"GRANT CREATE ON SCHEMA {schema} TO {user}")
    elif owned := connection.exec_driver_sql(_OF_OTHERS).scalar_one_or_none():
        remedy = f"let the owner of these tables start the bank, or ALTER TABLE … OWNER TO {user}"
        yield Lack(f"the table {owned}, another role owns it", NO_START, remedy)
    if not is_lasting:
        yield Lack("fsync", "a crash of its machine may lose acknowledged changes", "set fsync = on")
    if num_connections < NUM_CONNECTIONS:
        remedy = "raise max_connections, or the limit of the role or the database"
        yield Lack(f"{NUM_CONNECTIONS} connections, it has {num_connections}", "calls fail under load", remedy)


def _extension_state(connection: sa.Connection) -> EngineState:
    found = connection.exec_driver_sql(_EXTENSION).one_or_none()
    least = ".".join(map(str, LEAST_VECTOR))
    if found is None:
        lack = Lack("the extension on the server", NO_START, f"install pgvector {least} or newer there")
        return EngineState(EXTENSION, False, lacks=(lack,))
    installed, available, has_type, schema = found
    version = installed or available
    lack_or_none = None
    if numbers_of(version) < LEAST_VECTOR:
        remedy = f"install pgvector {least} or newer, and run ALTER EXTENSION vector UPDATE"
        lack_or_none = Lack(f"version {least}", NO_START, remedy)
    elif installed and not has_type:
        remedy = f"add the schema {schema} to search_path: ?options=-csearch_path%3DNAME,{schema}"
        lack_or_none = Lack("the type halfvec in search_path", NO_START, remedy)
    elif not installed and _refusal(connection, "CREATE EXTENSION vector") is not None:
        remedy = "let an administrator run CREATE EXTENSION vector in this database"
        lack_or_none = Lack("CREATE EXTENSION", NO_START, remedy)
    return EngineState(EXTENSION, True, version, () if lack_or_none is None else (lack_or_none,))


def _refusal(connection: sa.Connection, statement: str) -> str | None:
    """Tries a statement and takes it back. None: the server accepts it."""
    savepoint = connection.begin_nested()
    try:
        connection.exec_driver_sql(statement)
    except sa.exc.DBAPIError as error:
        return error_name(error)
    finally:
        savepoint.rollback()
    return None
