"""Conditions on documents' metadata, as the command line spells them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regrad_vllm.naming import OPERATORS_WITH_VALUES, Operator

if TYPE_CHECKING:
    from bank_service.wire.generated import bank_pb2

HELP = (
    "only documents whose metadata match, each time given; again with the same key: one of these values (or none of "
    "them). KEY alone: it is there, !KEY: it is not"
)
METAVAR = "KEY=VALUE|KEY!=VALUE|KEY|!KEY"
_COMPARISON = re.compile(r"([^=]*?)(!?=)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FilterFlag:
    """One --filter."""

    key: str
    operator: Operator
    value: str = ""


def filter_flag(text: str) -> FilterFlag:
    """argparse's type of --filter. A key can't have "=" in it here, nor begin with "!"."""
    compared = _COMPARISON.fullmatch(text)
    if compared is None and text.lstrip("!"):
        key = text.removeprefix("!")
        if not key.startswith("!"):
            return FilterFlag(key, "absent" if text.startswith("!") else "present")
    elif compared is not None and not compared[1].startswith("!"):
        return FilterFlag(compared[1], "equals" if compared[2] == "=" else "not_equals", compared[3])
    raise argparse.ArgumentTypeError(f"must be KEY=VALUE, KEY!=VALUE, KEY or !KEY, got {text!r}")


def filter_of(flags: Sequence[FilterFlag]) -> bank_pb2.Filter:
    """On the wire. Values that one key must be, or must not be, are one condition."""
    from bank_service.wire.generated import bank_pb2

    grouped: dict[tuple[str, Operator], list[str]] = {}
    for flag in flags:
        values = grouped.setdefault((flag.key, flag.operator), [])
        if flag.operator in OPERATORS_WITH_VALUES:
            values.append(flag.value)
    kind = bank_pb2.Filter.Condition
    return bank_pb2.Filter(
        conditions=[
            kind(key=key, operator=operator.upper(), values=values) for (key, operator), values in grouped.items()
        ]
    )
