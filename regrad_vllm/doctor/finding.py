"""The value that each check returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "odd", "wrong"]  # odd: it works, at a cost; wrong: something doesn't work


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    state: State
    found: str
    remedy: str = ""  # empty: there is nothing to do
