"""Conditions of a filter on JSONB."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from bank_service.values.filters import Condition, Operator


def meets(pairs: sa.ColumnElement[Any], condition: Condition) -> sa.ColumnElement[bool]:
    """The condition on a JSONB object, in SQL. An index over the object finds EQUALS and PRESENT."""
    if condition.values:
        found = sa.or_(sa.false(), *(pairs.contains({condition.key: value}) for value in _possible(condition)))
    else:
        found = pairs.has_key(condition.key) if "\0" not in condition.key else sa.false()
    return found if condition.operator in (Operator.EQUALS, Operator.PRESENT) else sa.not_(found)


def _possible(condition: Condition) -> list[str]:
    """The values that a document may have. None has a NUL, which PostgreSQL doesn't take."""
    return [] if "\0" in condition.key else [value for value in condition.values if "\0" not in value]
