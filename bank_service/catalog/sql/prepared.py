"""Statements compiled once for each kind of database.

For each call, SQLAlchemy builds a statement, its cache key and a description of its result. That takes several times
as long as SQLite needs for a query by key. So a statement is compiled at its first use, and from then on the driver
gets only its text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A statement as one driver takes it."""

    sql: str
    names: tuple[str, ...] | None  # of the parameters, in their order; None: the driver takes them by name
    constants: Mapping[str, Any]  # parameters that the statement itself sets
    options: Mapping[str, bool]  # of the driver


class Prepared:
    """A compiled statement: ``Prepared(statement).rows(connection, name=value)``, a value for each ``bindparam``.

    Values have the driver's types, because no column type converts them.
    """

    def __init__(self, statement: sa.Select[Any] | sa.sql.dml.UpdateBase, columns: Sequence[str] | None = None) -> None:
        """``columns``: the columns that an INSERT or UPDATE without ``values`` sets. Each is a parameter."""
        self._statement = statement
        self._set = columns
        selected = statement.selected_columns if isinstance(statement, sa.Select) else ()
        self._columns = tuple(column.name for column in selected)
        self._has_bytes = any(isinstance(column.type, sa.LargeBinary) for column in selected)
        self._compiled: dict[str, _Compiled] = {}  # by the dialect's name

    def rows(self, connection: sa.Connection, **values: Any) -> list[tuple[Any, ...]]:
        compiled = self._compiled.get(connection.dialect.name) or self._compile(connection.dialect)
        given = {**compiled.constants, **values}
        names = compiled.names
        ordered = given if names is None else tuple([given[name] for name in names])
        return run_text(connection, compiled.sql, ordered, **compiled.options)

    def one(self, connection: sa.Connection, **values: Any) -> Mapping[str, Any] | None:
        """The only row, by column, or None."""
        rows = self.rows(connection, **values)
        return dict(zip(self._columns, *rows, strict=True)) if rows else None

    def run(self, connection: sa.Connection, **values: Any) -> None:
        """For a statement without rows."""
        self.rows(connection, **values)

    def _compile(self, dialect: sa.Dialect) -> _Compiled:
        compiled = self._statement.compile(dialect=dialect, column_keys=self._set)
        constants = {name: value for name, value in compiled.params.items() if type(value) in (int, str)}
        names = tuple(compiled.positiontup or ()) if compiled.positional else None
        # PostgreSQL sends bytes as hexadecimal text otherwise.
        options = {"binary": True} if self._has_bytes and dialect.name == "postgresql" else {}
        self._compiled[dialect.name] = made = _Compiled(str(compiled), names, constants, options)
        return made


def run_text(
    connection: sa.Connection, sql: str, values: Sequence[Any] | Mapping[str, Any] | None = (), **options: bool
) -> list[tuple[Any, ...]]:
    """Runs a statement in the database's own SQL and returns all rows. The connection must be in a transaction.

    It calls the driver directly. For a statement of a few microseconds, SQLAlchemy takes ten times as long. Errors are
    SQLAlchemy's, without the values. ``values`` None: PostgreSQL takes several statements, and the rows of the first
    come back. ``options``: of the driver's ``execute``.
    """
    driver: Any = connection.connection.driver_connection
    dialect = connection.dialect
    try:
        cursor = driver.execute(sql, values, **options)
        return cursor.fetchall() if cursor.description else []  # some errors come only with the rows
    except dialect.loaded_dbapi.Error as error:
        is_lost = dialect.is_disconnect(error, driver, None)
        if is_lost:
            # The pool's other connections are broken, too. This is what SQLAlchemy does after its own statements:
            # nobody gets them again, and each is closed.
            connection.engine.pool._invalidate(connection.connection, error)
            connection.invalidate(error)
        raise sa.exc.DBAPIError.instance(
            sql,
            None,
            error,
            dialect.loaded_dbapi.Error,
            hide_parameters=True,
            connection_invalidated=is_lost,
            dialect=dialect,
        ) from error


class _ListItems(sa.sql.functions.FunctionElement[Any]):
    """A row for each item of a JSON array; each has the item in its column ``value``."""

    name = "list_items"
    inherit_cache = True


@compiles(_ListItems, "sqlite")
def _in_sqlite(element: _ListItems, compiler: sa.sql.compiler.SQLCompiler, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(_ListItems, "postgresql")
def _in_postgres(element: _ListItems, compiler: sa.sql.compiler.SQLCompiler, **options: Any) -> str:
    return f"json_array_elements_text(({compiler.process(element.clauses, **options)})::json)"


def among(name: str, kind: type[sa.types.TypeEngine[Any]] = sa.Text) -> sa.Select[Any]:
    """The values of a list parameter, for ``column.in_(among(name))``. ``listed`` makes the parameter.

    ``kind`` is the values' type: ``sa.Text`` or ``sa.BigInteger``.
    """
    value: sa.ColumnElement[Any] = sa.column("value")
    if kind is not sa.Text:
        value = sa.cast(value, kind)
    return sa.select(value).select_from(_ListItems(sa.bindparam(name)).table_valued("value"))


def listed(values: Iterable[str] | Iterable[int]) -> str:
    return json.dumps(list(values))
