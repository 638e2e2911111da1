"""Checks a server before a bank keeps its catalog there."""

from __future__ import annotations

import logging
import re

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import error_name, reason_of, shown, writer_of
from bank_service.catalog.postgres.membership import Membership

logger = logging.getLogger(__name__)

LEAST_SERVER = 16
LEAST_VECTOR = (0, 8)
ANSWER = "an answer"
# Faults by the driver's reason, with the remedy of each. The first that fits.
_FAULTS = (
    (
        re.compile('database "[^"]+" does not exist'),
        "the database",
        "let an administrator run createdb --owner USER --encoding UTF8 --template template0 NAME, or mend its URL",
    ),
    (
        re.compile('role "[^"]+" does not exist|authentication failed|no password supplied'),
        "a user whom it lets in",
        "mend the user in its URL, or the password in PGPASSWORD or the password file",
    ),
    (
        re.compile("no pg_hba.conf entry"),
        "a user whom it lets in",
        "let an administrator add this user, database and host to pg_hba.conf",
    ),
    (re.compile("permission denied"), "rights", "let an administrator give this user the rights on the database"),
    (re.compile("too many"), "free connections", "raise max_connections, or end other clients"),
    (re.compile(""), ANSWER, "start PostgreSQL, or mend host and port in its URL"),
)


def check_free(url: str, *, is_shared: bool) -> None:
    """RuntimeError where the server can't be reached or can't hold a catalog. BankInUseError where another bank has it
    and doesn't share it.

    Changes nothing.
    """
    engine = writer_of(url)
    sa.event.listen(engine, "connect", Membership(is_shared=is_shared).enter)
    try:
        with engine.begin() as connection:
            check_server(connection, url)
    except sa.exc.SQLAlchemyError as error:
        raise unreachable(url, error) from error
    finally:
        engine.dispose()


def unreachable(url: str, error: Exception) -> RuntimeError:
    """The error for a bank's start. Its message goes to the operator alone, so it has the driver's first line."""
    reason = reason_of(error)
    return RuntimeError(f"the catalog {shown(url)} must be reachable, got: {reason}; {fault_of(reason)[1]}")


def fault_of(reason: str) -> tuple[str, str]:
    """Says by the driver's reason what a server lacks, and the remedy."""
    return next((missing, remedy) for fault, missing, remedy in _FAULTS if fault.search(reason))


def check_server(connection: sa.Connection, url: str) -> None:
    """RuntimeError for an old server, an old pgvector, or a database in another encoding than UTF-8."""
    version, encoding, is_lasting = connection.exec_driver_sql(
        "SELECT current_setting('server_version_num')::int / 10000, current_setting('server_encoding'), "
        "current_setting('fsync')::bool"
    ).one()
    if version < LEAST_SERVER:
        raise RuntimeError(f"PostgreSQL must be {LEAST_SERVER} or newer, got {version} at {shown(url)}")
    if encoding != "UTF8":
        raise RuntimeError(f"the database must have the encoding UTF8, got {encoding} at {shown(url)}")
    if not is_lasting:
        logger.warning("PostgreSQL runs with fsync off: a crash of its machine may lose changes that were acknowledged")
    found = connection.exec_driver_sql(
        "SELECT coalesce(installed_version, default_version) FROM pg_available_extensions WHERE name = 'vector'"
    ).scalar_one_or_none()
    if numbers_of(found or "0.0") < LEAST_VECTOR:
        least = ".".join(map(str, LEAST_VECTOR))
        got = f"pgvector {found}" if found else "no pgvector"
        raise RuntimeError(
            f"the server must have pgvector {least} or newer, got {got} at {shown(url)}; install it there, or run "
            "ALTER EXTENSION vector UPDATE"
        )


def numbers_of(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2])


def check_schema(connection: sa.Connection, url: str) -> None:
    """RuntimeError where the search path leads to the catalog of another schema than its first.

    Two banks with different first schemas would have different locks, and would share the tables of the second.
    """
    schema, other = connection.exec_driver_sql(
        "SELECT current_schema(), (SELECT nspname FROM pg_class JOIN pg_namespace space ON space.oid = relnamespace "
        "WHERE pg_class.oid = to_regclass('collection') AND nspname <> current_schema())"
    ).one()
    if other is not None:
        raise RuntimeError(
            f"search_path must lead to one catalog, got that of the schema {other} behind {schema} at {shown(url)}; "
            f"name a schema of its own for each bank, and keep no catalog in {other}"
        )


def add_extension(connection: sa.Connection, url: str) -> None:
    """Adds pgvector to the database. RuntimeError where this user may not."""
    if connection.exec_driver_sql("SELECT 1 FROM pg_extension WHERE extname = 'vector'").first() is not None:
        return
    try:
        connection.exec_driver_sql("CREATE EXTENSION vector")
    except sa.exc.DBAPIError as error:
        raise RuntimeError(
            f"the database at {shown(url)} must have the extension vector, got {error_name(error)} on creating it; "
            "let an administrator run CREATE EXTENSION vector"
        ) from error
