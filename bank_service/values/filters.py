"""Filters on metadata. A document must meet all conditions of a filter. ``attributes.py`` evaluates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from bank_service.errors import InvalidArgumentError
from bank_service.wire import limits


class Operator(Enum):
    """The comparison of a condition."""

    EQUALS = 1  # the key is present and its value is in ``values``
    NOT_EQUALS = 2  # the key is absent or its value is not in ``values``
    PRESENT = 3
    ABSENT = 4


@dataclass(frozen=True, slots=True)
class Condition:
    """A rule for one key of a document's metadata. InvalidArgumentError names its part."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def holds(self, pairs: Mapping[str, str]) -> bool:
        """Whether a document's metadata meets the condition."""
        if self.operator in (Operator.PRESENT, Operator.ABSENT):
            return (self.key in pairs) is (self.operator is Operator.PRESENT)
        return (pairs.get(self.key) in self.values) is (self.operator is Operator.EQUALS)

    def check(self, field: str) -> None:
        """InvalidArgumentError for an invalid condition. ``field`` is the condition's path within the request."""
        # Metadata may have an empty key.
        for path, text in ((f"{field}.key", self.key), *((f"{field}.values", value) for value in self.values)):
            if len(text.encode()) > limits.MAX_METADATA_BYTES:
                raise InvalidArgumentError(
                    f"{path} must be at most {limits.MAX_METADATA_BYTES} bytes, as metadata is, "
                    f"got {len(text.encode())}",
                    field=path,
                )
        takes_values = self.operator in (Operator.EQUALS, Operator.NOT_EQUALS)
        lowest, highest = (1, limits.MAX_CONDITION_VALUES) if takes_values else (0, 0)
        if not lowest <= len(self.values) <= highest:
            rule = f"{lowest}..{highest}" if takes_values else "none"
            raise InvalidArgumentError(
                f"{field}.values must be {rule} with {self.operator.name}, got {len(self.values)}",
                field=f"{field}.values",
            )


def check_filter(conditions: Sequence[Condition]) -> None:
    """InvalidArgumentError names the condition and its part."""
    if len(conditions) > limits.MAX_CONDITIONS:
        raise InvalidArgumentError(
            f"filter.conditions must be at most {limits.MAX_CONDITIONS}, got {len(conditions)}",
            field="filter.conditions",
        )
    for index, condition in enumerate(conditions):
        condition.check(f"filter.conditions[{index}]")
