"""Statements compiled once.

For each call, SQLAlchemy builds a statement, its cache key and a description of its result. That takes several times
as long as SQLite needs for a query by key. So the statements are compiled when their module is loaded, and the driver
gets only their text.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite


class Prepared:
    """A compiled statement: ``Prepared(statement).rows(connection, name=value)``, a value for each ``bindparam``.

    Values have the driver's types, because no column type converts them.
    """

    def __init__(self, statement: sa.Select[Any] | sa.sql.dml.UpdateBase, columns: Sequence[str] | None = None) -> None:
        """``columns``: the columns that an INSERT or UPDATE without ``values`` sets. Each is a parameter."""
        compiled = statement.compile(dialect=sqlite.dialect(), column_keys=columns)
        self._sql = str(compiled)
        self._names: tuple[str, ...] = tuple(compiled.positiontup or ())
        selected = statement.selected_columns if isinstance(statement, sa.Select) else ()
        self._columns = tuple(column.name for column in selected)
        self._constants: Mapping[str, Any] = {
            name: value for name, value in compiled.params.items() if type(value) in (int, str)
        }

    def rows(self, connection: sa.Connection, **values: Any) -> list[tuple[Any, ...]]:
        given = {**self._constants, **values}
        return run_text(connection, self._sql, tuple([given[name] for name in self._names]))

    def one(self, connection: sa.Connection, **values: Any) -> Mapping[str, Any] | None:
        """The only row, by column, or None."""
        rows = self.rows(connection, **values)
        return dict(zip(self._columns, *rows, strict=True)) if rows else None

    def run(self, connection: sa.Connection, **values: Any) -> None:
        """For a statement without rows."""
        self.rows(connection, **values)


def run_text(connection: sa.Connection, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """Runs a statement in SQLite's SQL and returns all rows. The connection must be in a transaction.

    It calls the driver directly. For a statement of a few microseconds, SQLAlchemy takes ten times as long. Errors are
    SQLAlchemy's, without the values.
    """
    driver: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
    try:
        return driver.execute(sql, values).fetchall()  # some errors come only with the rows
    except sqlite3.Error as error:
        raise sa.exc.DBAPIError.instance(
            sql, None, error, sqlite3.Error, hide_parameters=True, dialect=connection.dialect
        ) from error


def among(name: str) -> sa.Select[Any]:
    """The values of a list parameter, for ``column.in_(among(name))``. ``listed`` makes the parameter."""
    return sa.select(sa.column("value")).select_from(sa.func.json_each(sa.bindparam(name)).table_valued("value"))


def listed(values: Iterable[str] | Iterable[int]) -> str:
    return json.dumps(list(values))
