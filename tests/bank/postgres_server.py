"""PostgreSQL for tests. Each test has a schema of its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from benchmarks.servers.postgres_server import PostgresServer


@cache
def shared_server() -> PostgresServer:
    """One server for all tests of a process. It skips the test where no server can start."""
    return started("-c", "fsync=off")


def started(*options: str, primary: PostgresServer | None = None) -> PostgresServer:
    """A server of the test's own, or a replica of one. It skips the test where none can start."""
    try:
        return PostgresServer(*options, primary=primary)
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"PostgreSQL can't start here: {error}")


@cache
def schema_of(folder: Path) -> str:
    """The URL of the schema that goes with a bank's folder: the same one each time."""
    return shared_server().new_schema()
