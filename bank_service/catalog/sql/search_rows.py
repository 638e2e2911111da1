"""The contract of the rows that a store keeps for its searches, beside each living document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import sqlalchemy as sa

from bank_service.catalog.sql.versions import Row
from bank_service.values.filters import Condition


class SearchRows(Protocol):
    """Metadata, words and perhaps vectors of the living documents. A document's own transaction writes them."""

    def put(self, connection: sa.Connection, new: Row, pairs: Mapping[str, str], before: Row | None) -> None:
        """Adds the rows of a version. ``before`` is the living version that it replaces, if there is one."""
        ...

    def remove(self, connection: sa.Connection, row: Row) -> None:
        """Removes the rows of a version that lived."""
        ...

    def matching(
        self,
        connection: sa.Connection,
        namespace: str,
        conditions: Sequence[Condition],
        limit: int | None,
        as_of: int | None,
    ) -> list[int]:
        """See ``CatalogView.matching``."""
        ...  # fmt: skip

    def among(
        self, connection: sa.Connection, keys: Sequence[int], conditions: Sequence[Condition], as_of: int | None
    ) -> set[int]:
        """See ``CatalogView.among``."""
        ...

    def holds(self, condition: Condition) -> sa.ColumnElement[Any]:
        """The condition in SQL, for a statement that reads ``versions``."""
        ...


def has_new_text(new: Row, before: Row | None) -> bool:
    """Whether a version has another title or text than the one that it replaces."""
    return before is None or (before["title"], before["text"]) != (new["title"], new["text"])
