"""Vectors, metadata (``partitions``) and words of a document; see ``sql.search_rows.SearchRows``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from bank_service.catalog.contract import MAX_KEYS
from bank_service.catalog.postgres import partitions
from bank_service.catalog.postgres.json_conditions import meets
from bank_service.catalog.postgres.word_rows import put_words, remove_words
from bank_service.catalog.sql.search_rows import has_new_text
from bank_service.catalog.sql.tables import living, versions
from bank_service.catalog.sql.versions import Row
from bank_service.values.filters import Condition

_KEYS = ARRAY(sa.BigInteger)


class PostgresSearchRows:
    """Implements ``SearchRows``."""

    def put(self, connection: sa.Connection, new: Row, pairs: Mapping[str, str], before: Row | None) -> None:
        number = partitions.number_of(connection, new["namespace"])
        if number is None:
            number = partitions.create(connection, new["namespace"])
        partitions.put_vector(connection, number, new, pairs, before)
        if has_new_text(new, before):
            if before is not None:
                remove_words(connection, number, before["key"])
            put_words(connection, number, new)

    def remove(self, connection: sa.Connection, row: Row) -> None:
        number = partitions.number_of(connection, row["namespace"])
        assert number is not None, "a namespace with a document has a partition"
        partitions.remove_vector(connection, number, row["key"])
        remove_words(connection, number, row["key"])

    def matching(
        self,
        connection: sa.Connection,
        namespace: str,
        conditions: Sequence[Condition],
        limit: int | None,
        as_of: int | None,
    ) -> list[int]:
        number = partitions.number_of(connection, namespace)
        if number is None:
            return []
        table = partitions.partition(number)
        query = sa.select(table.c.key).where(*(meets(table.c.pairs, condition) for condition in conditions))
        if as_of is not None:
            query = query.where(table.c.began <= as_of)
        return sorted(connection.execute(query.limit(limit)).scalars())  # fmt: skip

    def among(
        self, connection: sa.Connection, keys: Sequence[int], conditions: Sequence[Condition], as_of: int | None
    ) -> set[int]:
        found: set[int] = set()
        for start in range(0, len(keys), MAX_KEYS):
            chosen = versions.c.key == sa.any_(sa.cast(list(keys[start : start + MAX_KEYS]), _KEYS))
            query = sa.select(versions.c.key).where(chosen, living, *map(self.holds, conditions))
            if as_of is not None:
                query = query.where(versions.c.began <= as_of)
            found.update(connection.execute(query).scalars())
        return found

    def holds(self, condition: Condition) -> sa.ColumnElement[Any]:
        return meets(sa.cast(versions.c.metadata, JSONB), condition)
