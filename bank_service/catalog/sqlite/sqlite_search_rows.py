"""Metadata (``attributes``) and words (``lexical``) of a document in SQLite; see ``sql.search_rows.SearchRows``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.sql.search_rows import has_new_text
from bank_service.catalog.sql.tables import versions
from bank_service.catalog.sql.versions import Row
from bank_service.catalog.sqlite import attributes
from bank_service.catalog.sqlite.lexical import put_words, remove_words
from bank_service.values.filters import Condition


class SqliteSearchRows:
    """Implements ``SearchRows``."""

    def put(self, connection: sa.Connection, new: Row, pairs: Mapping[str, str], before: Row | None) -> None:
        if before is not None:
            attributes.remove_attributes(connection, before["key"])
        attributes.put_attributes(connection, new["key"], new["namespace"], pairs)
        if has_new_text(new, before):
            if before is not None:
                _remove_words(connection, before)
            put_words(connection, new["key"], new["namespace"], new["title"], new["text"])

    def remove(self, connection: sa.Connection, row: Row) -> None:
        attributes.remove_attributes(connection, row["key"])
        _remove_words(connection, row)

    def matching(
        self,
        connection: sa.Connection,
        namespace: str,
        conditions: Sequence[Condition],
        limit: int | None,
        as_of: int | None,
    ) -> list[int]:
        return attributes.matching(connection, namespace, conditions, limit, as_of)  # fmt: skip

    def among(
        self, connection: sa.Connection, keys: Sequence[int], conditions: Sequence[Condition], as_of: int | None
    ) -> set[int]:
        return attributes.among(connection, keys, conditions, as_of)

    def holds(self, condition: Condition) -> sa.ColumnElement[Any]:
        return attributes.holds(condition, versions.c.key)


def _remove_words(connection: sa.Connection, row: Row) -> None:
    remove_words(connection, row["key"], row["namespace"], row["title"], row["text"])
