"""COPY of rows into a table, in PostgreSQL's binary format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa


def copy_rows(connection: sa.Connection, table: str, kinds: Mapping[str, str], rows: Iterable[Sequence[Any]]) -> None:
    """Adds rows. ``kinds``: column → type of its values, in the order of each row. "bytea" gives a column of another
    type the bytes of its own binary format. The driver's errors."""
    driver: Any = connection.connection.driver_connection
    statement = f"COPY {table} ({', '.join(kinds)}) FROM STDIN (FORMAT BINARY)"
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types(list(kinds.values()))
        for row in rows:
            copy.write_row(row)
