"""Connections to PostgreSQL: the URL, the settings of a session, and what an error is called."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from bank_service.catalog.postgres.membership import BEGIN_WRITE, IDLE_SECONDS
from bank_service.catalog.sql.prepared import run_text
from bank_service.values.catalog_url import hosts_of, netloc_of

CONNECT_SECONDS = 5
READ_SECONDS = 60  # the longest that one statement of a reader may take
LOCK_SECONDS = 10  # the longest that a write waits for a lock, such as that of an operator's VACUUM FULL
# A connection that a network has dropped without a word is noticed after so long, by either end.
_SILENCE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
# Parameters of libpq; those in the URL go first.
_PARAMETERS: dict[str, str | int] = {
    "connect_timeout": CONNECT_SECONDS,
    "application_name": "regrad-bank",
    "client_encoding": "utf8",  # without it a database of SQL_ASCII gives bytes, and couldn't be refused by name
    "tcp_user_timeout": 15_000,  # milliseconds
    **_SILENCE,
}
_SESSION = (
    *(f"SET tcp_{name} = {value}" for name, value in _SILENCE.items()),
    f"SET lock_timeout = {LOCK_SECONDS * 1000}",
    "SET client_min_messages = warning",
)
_READER = (
    f"SET statement_timeout = {READ_SECONDS * 1000}",
    # A plan for any filter would be a bad one for most: how many documents meet it decides the way.
    "SET plan_cache_mode = force_custom_plan",
    "SET jit = off",  # it takes longer to compile a search than to run it
)
# The server may be stricter: then a commit also waits for its standbys.
_WRITER = (
    "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') IN "
    "('off', 'local')",
)
NUM_READERS = 8  # connections kept open; more are opened while more threads read


def reader_of(url: str) -> sa.Engine:
    """Transactions that read one committed state."""
    begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    return _engine(url, begin, (*_SESSION, *_READER), pool_size=NUM_READERS, max_overflow=-1)


def writer_of(url: str) -> sa.Engine:
    """Transactions that write, on one connection. Those of all nodes come one after the other."""
    return _engine(url, BEGIN_WRITE, (*_SESSION, *_WRITER), pool_size=1, max_overflow=0)


def locks_of(url: str) -> sa.Engine:
    """One connection, which only holds locks. The server ends it after IDLE_SECONDS without a statement."""
    silence = f"SET idle_session_timeout = {IDLE_SECONDS * 1000}"
    return _engine(url, "BEGIN", (*_SESSION, silence), pool_size=1, max_overflow=0)


def shown(url: str) -> str:
    """The URL without its password."""
    return _parsed(url).render_as_string(hide_password=True)


def state_of(error: BaseException) -> str | None:
    """PostgreSQL's code for the fault, five characters. None where the server said none."""
    return getattr(_cause(error), "sqlstate", None)


def error_name(error: BaseException) -> str:
    """The error's name, without its message: that may have text of a document or an address of the operator's."""
    name, state = type(_cause(error)).__name__, state_of(error)
    return f"{name} {state}" if state else name


def reason_of(error: BaseException) -> str:
    """The first line that the driver says, for the operator alone: it may have addresses."""
    return (str(_cause(error)).strip() or error_name(error)).splitlines()[0]


def name_for_log(error: BaseException) -> str:
    """The error's name. Where no connection was made, or one broke, the driver's reason: it has no document's text."""
    name = error_name(error)
    return reason_of(error) if name == "OperationalError" else name


def _cause(error: BaseException) -> BaseException:
    """The driver's error in SQLAlchemy's."""
    return getattr(error, "orig", None) or error


def _parsed(url: str) -> sa.URL:
    """SQLAlchemy takes several hosts with ports only as options."""
    hosts = hosts_of(url)
    if len(hosts) == 1:
        return sa.make_url(url)
    netloc = netloc_of(url)
    bare = url.replace(netloc, "".join(netloc.rpartition("@")[:2]), 1)
    names, ports = zip(*hosts, strict=True)
    return sa.make_url(bare).update_query_dict(
        {"host": ",".join(names), "port": ",".join(str(port or "") for port in ports)}
    )


def _engine(url: str, begin: str, session: tuple[str, ...], **pool: int) -> sa.Engine:
    parsed = _parsed(url).set(drivername="postgresql+psycopg")
    try:
        engine = sa.create_engine(
            parsed,
            connect_args={name: value for name, value in _PARAMETERS.items() if name not in parsed.query},
            hide_parameters=True,  # parameters are texts of documents, which must not get into errors and logs
            **pool,
        )
    except ImportError as error:
        raise RuntimeError(
            "psycopg must be installed for a catalog in PostgreSQL; pip install '.[postgres]'"
        ) from error

    def on_connect(connection: Any, _record: object) -> None:
        connection.autocommit = True  # otherwise the driver begins transactions by itself
        try:
            for statement in session:
                connection.execute(statement)
        except BaseException:
            connection.close()  # the pool forgets it
            raise

    def on_begin(connection: sa.Connection) -> None:
        run_text(connection, begin, None)

    sa.event.listen(engine, "connect", on_connect)
    sa.event.listen(engine, "begin", on_begin)
    return engine
