"""The command line's syntax for conditions on metadata."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from regrad_vllm.client import Condition
from regrad_vllm.client.values import OPERATORS_WITH_VALUES, Operator

HELP = (
    "only documents whose metadata match, each time given; again with the same key: one of these values (or none of "
    "them). KEY alone: it is there, !KEY: it is not. Spaces around key and value don't count"
)
METAVAR = "KEY=VALUE|KEY!=VALUE|KEY|!KEY"
_COMPARISON = re.compile(r"([^=]*?)(!?=)(.*)", re.DOTALL)
_KEY = re.compile(r"[^!<>=]+")


@dataclass(frozen=True, slots=True)
class FilterFlag:
    """One --filter."""

    key: str
    operator: Operator
    value: str = ""


def filter_flag(text: str) -> FilterFlag:
    """Parses the value of --filter. argparse shows its errors.

    A key must not be empty or contain one of "!=<>", and a value must not begin with "=". Metadata may have such keys
    and values. But a user who writes "size>3" or "lang==de" means a comparison, which would find nothing. Spaces around
    the operator, as in "lang = de", are removed for the same reason.
    """
    condition = text.strip()
    compared = _COMPARISON.fullmatch(condition)
    key = (condition.removeprefix("!") if compared is None else compared[1]).strip()
    value = "" if compared is None else compared[3].strip()
    if not _KEY.fullmatch(key) or value.startswith("="):
        raise argparse.ArgumentTypeError(
            f"must be KEY=VALUE, KEY!=VALUE, KEY or !KEY (one =, and no KEY with !, < or >), got {text!r}"
        )
    if compared is None:
        return FilterFlag(key, "absent" if condition.startswith("!") else "present")
    return FilterFlag(key, "equals" if compared[2] == "=" else "not_equals", value)


def conditions_of(flags: Sequence[FilterFlag]) -> tuple[Condition, ...]:
    """The query's conditions. All values for the same key and operator are joined in one condition."""
    grouped: dict[tuple[str, Operator], list[str]] = {}
    for flag in flags:
        values = grouped.setdefault((flag.key, flag.operator), [])
        if flag.operator in OPERATORS_WITH_VALUES:
            values.append(flag.value)
    return tuple(Condition(key, operator, tuple(values)) for (key, operator), values in grouped.items())
