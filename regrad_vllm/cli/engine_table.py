"""The table of `regrad bank --check`: a row for each engine, and for each thing that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrad_vllm.console import say

if TYPE_CHECKING:
    from bank_service.values.engine_state import EngineState

_HEAD = ("engine", "reached", "version", "missing", "costs", "do")
_REACHED = {True: "yes", False: "no", None: "-"}


def say_table(states: Sequence[EngineState]) -> None:
    rows = [_HEAD]
    for state in states:
        lacks = [(lack.missing, lack.cost, lack.remedy) for lack in state.lacks] or [("", "", "")]
        for place, lack in enumerate(lacks):
            own = (state.engine, _REACHED[state.reached], state.version or "-") if not place else ("", "", "")
            rows.append((*own, *lack))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
